# SPDX-License-Identifier: Apache-2.0
"""Dense models of Llama's family: Llama, Mistral, Qwen2 (biases on queries, keys and values), Qwen3 (norms on both)."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures.common import (
    Flags,
    attention_weights,
    decoder_flags,
    dense_weights,
    layers_of,
    outer_weights,
)
from megatron_smar.conversion.weights import Weight


def has_qkv_bias(config: PretrainedConfig) -> bool:
    """Returns whether queries, keys and values have biases."""
    return config.model_type == "qwen2"


def has_qk_norm(config: PretrainedConfig) -> bool:
    """Returns whether the heads of queries and keys are normalized."""
    return config.model_type == "qwen3"


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a config."""
    return decoder_flags(config) | {"add-qkv-bias": has_qkv_bias(config), "qk-layernorm": has_qk_norm(config)}


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a config."""
    attention = attention_weights(config, bias=has_qkv_bias(config), qk_norm=has_qk_norm(config))
    return outer_weights(config) + attention + dense_weights(layers_of(config), config.intermediate_size)
