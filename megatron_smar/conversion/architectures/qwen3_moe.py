# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (30B-A3B): the heads of queries and keys are normalized, and some layers may be dense."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures.common import (
    Flags,
    attention_weights,
    decoder_flags,
    dense_weights,
    expert_weights,
    layers_of,
    moe_flags,
    outer_weights,
)
from megatron_smar.conversion.weights import Weight


def moe_layers(config: PretrainedConfig) -> list[int]:
    """Returns the numbers of the MoE layers, from 0."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    sparse = layers_of(config) if config.num_experts else ()
    return [layer for layer in sparse if (layer + 1) % step == 0 and layer not in dense]


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a config."""
    decoder = decoder_flags(config) | {"qk-layernorm": True}
    moe = moe_layers(config)
    if not moe:
        return decoder
    pre_softmax = not config.norm_topk_prob
    return decoder | moe_flags(config, config.num_experts, config.moe_intermediate_size, pre_softmax, moe)


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a config."""
    moe = moe_layers(config)
    dense = [layer for layer in layers_of(config) if layer not in moe]
    return [
        *outer_weights(config),
        *attention_weights(config, qk_norm=True),
        *dense_weights(dense, config.intermediate_size),
        *expert_weights(moe, config.num_experts, config.moe_intermediate_size),
    ]
