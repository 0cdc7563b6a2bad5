# SPDX-License-Identifier: Apache-2.0
"""The parts of the model that `--freeze` names, and which parameter belongs to which."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

LANGUAGE_PARTS = ("embeddings", "attention", "norms", "dense", "experts", "router")
PARTS = ("vision", "connector", "language", *LANGUAGE_PARTS)

# The first pattern that matches a parameter's name decides. Transformer Engine stores a norm in the linear layer that
# follows it (`linear_qkv.layer_norm_weight`), so `norms` comes before the parts that contain such layers.
_PATTERNS = {
    "vision": r"^vision_model\.",
    "connector": r"^connector\.",
    "norms": r"layer_?norm",
    "embeddings": r"^language_model\.(embedding|output_layer)\.",
    "attention": r"\.self_attention\.",
    "router": r"\.mlp\.router\.",
    "experts": r"\.mlp\.(experts|shared_experts|fc\d_latent_proj)\.",
    "dense": r"\.mlp\.linear_fc\d\.",
}


def part_of(name: str) -> str:
    """Returns the part that a parameter of `VisionLanguageModel` belongs to: vision, connector or a language part.

    Args:
        name: Name of the parameter from `named_parameters`, without the prefixes of wrappers.

    Raises:
        ValueError: The parameter belongs to no part, so no `--freeze` could name it.
    """
    for part, pattern in _PATTERNS.items():
        if re.search(pattern, name):
            return part
    raise ValueError(f"the parameter {name} belongs to no part that --freeze knows ({', '.join(_PATTERNS)}).")


def frozen_parts(freeze: Collection[str]) -> frozenset[str]:
    """Returns the parts that `--freeze` names, with `language` replaced by LANGUAGE_PARTS."""
    return frozenset(freeze) - {"language"} | frozenset(LANGUAGE_PARTS if "language" in freeze else ())


def freeze_parameters(model: nn.Module, frozen: Collection[str]) -> None:
    """Disables the gradient of every parameter of these parts; other parameters are left unchanged.

    Args:
        model: Model of a pipeline stage.
        frozen: Parts to freeze, as `frozen_parts` returns them.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    if "router" in frozen:
        for module in model.modules():
            if getattr(module, "expert_bias", None) is not None:
                # DeepSeek-V3's expert bias is updated without a gradient, unless Megatron finds this attribute.
                module.frozen_expert_bias = True  # type: ignore[assignment]
