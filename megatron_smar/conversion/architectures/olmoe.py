# SPDX-License-Identifier: Apache-2.0
"""OLMoE: every layer is an MoE layer; queries and keys have one norm each over all heads together."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures.common import (
    Flags,
    attention_weights,
    decoder_flags,
    expert_weights,
    layers_of,
    moe_flags,
    outer_weights,
    refuse,
)
from megatron_smar.conversion.weights import Weight


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a config."""
    refuse(config, clip_qkv=None)
    norms = {"qk-layernorm": True, "qk-norm-scope": "projection"}
    moe = moe_flags(config, config.num_experts, config.intermediate_size, pre_softmax=not config.norm_topk_prob)
    return decoder_flags(config) | norms | moe


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a config."""
    experts = expert_weights(layers_of(config), config.num_experts, config.intermediate_size)
    return outer_weights(config) + attention_weights(config, qk_norm=True) + experts
