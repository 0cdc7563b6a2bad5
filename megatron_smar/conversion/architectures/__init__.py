# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be converted, by Hugging Face model type: each has its flags and its weight table.

To add an architecture, write a file with two functions of the Hugging Face config, `flags` and `weights`, and add a
line to `LANGUAGES`.
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
        flags: Returns the trainer's flags for a config.
        weights: Returns the weight table for a config, with names as in the causal language model's own folder.
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
    """Returns the architecture of a causal language model.

    Raises:
        UnsupportedError: The model type is not supported, or the weights are quantized.
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
