# SPDX-License-Identifier: Apache-2.0
"""Mixtral (8x7B, 8x22B): every layer is an MoE layer; expert weights are the softmax over the chosen experts."""

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
    refuse(config, router_jitter_noise=0.0)
    moe = moe_flags(config, config.num_local_experts, config.intermediate_size, pre_softmax=False)
    return decoder_flags(config) | moe


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a config."""
    experts = expert_weights(
        layers_of(config),
        config.num_local_experts,
        config.intermediate_size,
        "block_sparse_moe",
        ("w1", "w3", "w2"),
    )
    return outer_weights(config) + attention_weights(config) + experts
