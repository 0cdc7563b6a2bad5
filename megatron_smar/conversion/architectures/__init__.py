# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be converted: for each its flags and its table of weights, by Hugging Face model type.

A new one is a file with two functions of the Hugging Face config, `flags` and `weights`, and a line in `LANGUAGES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures import deepseek, dense, mixtral, olmoe, phi, qwen3_moe
from megatron_smar.conversion.architectures.common import Flags, UnsupportedError
from megatron_smar.conversion.weights import Weight


@dataclass(frozen=True)
class Language:
    """A language model's architecture.

    Attributes:
        flags: Of the config: the flags under which the trainer builds this model.
        weights: Of the config: the table of its weights, named as in the causal language model's own folder.
    """

    flags: Callable[[PretrainedConfig], Flags]
    weights: Callable[[PretrainedConfig], list[Weight]]


LANGUAGES: dict[str, Language] = {
    "deepseek_v2": Language(deepseek.flags, deepseek.weights),
    "deepseek_v3": Language(deepseek.flags, deepseek.weights),
    "llama": Language(dense.flags, dense.weights),
    "mistral": Language(dense.flags, dense.weights),
    "mixtral": Language(mixtral.flags, mixtral.weights),
    "olmoe": Language(olmoe.flags, olmoe.weights),
    "phi": Language(phi.flags, phi.weights),
    "phi3": Language(phi.phi3_flags, phi.phi3_weights),
    "qwen2": Language(dense.flags, dense.weights),
    "qwen3": Language(dense.flags, dense.weights),
    "qwen3_moe": Language(qwen3_moe.flags, qwen3_moe.weights),
}


def language_of(config: PretrainedConfig) -> Language:
    """The architecture of a causal language model.

    Raises:
        UnsupportedError: With the list of those that are known; or its weights are quantised.
    """
    if config.model_type not in LANGUAGES:
        raise UnsupportedError(
            f"the language model's type is {config.model_type!r}; supported are {', '.join(sorted(LANGUAGES))}."
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        raise UnsupportedError(
            f"quantization_config is {quantisation!r} in the config of this {config.model_type} model; "
            "give its weights in float32, bfloat16 or float16."
        )
    return LANGUAGES[config.model_type]
