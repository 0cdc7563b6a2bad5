# SPDX-License-Identifier: Apache-2.0
"""Phi-1, 1.5, 2 (`phi`: attention parallel to the MLP, biases everywhere) and Phi-3 (fused weights on disk)."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures.common import (
    HF_LAYER,
    MEGATRON_LAYER,
    Flags,
    decoder_flags,
    head_dim,
    layers_of,
    norm_weights,
    outer_weights,
    refuse,
    rope_flags,
    shape_flags,
)
from megatron_smar.conversion.weights import Weight, fused_query_key_value, per_layer, query_key_value


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a Phi config."""
    refuse(config, hidden_act=("gelu_new", "gelu_pytorch_tanh"), qk_layernorm=False)
    return {
        **shape_flags(config),
        "normalization": "LayerNorm",
        "norm-epsilon": config.layer_norm_eps,
        "gelu-tanh": True,
        "parallel-block": True,
        "output-bias": True,
        **rope_flags(config, partial_rotary=True),
    }


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a Phi config: every weight has a bias."""
    return [row for kind in ("weight", "bias") for row in _weights(config, kind)]


def _weights(config: PretrainedConfig, kind: str) -> list[Weight]:
    layers, attention = layers_of(config), HF_LAYER + "self_attn."
    qkv = query_key_value(config.num_attention_heads, config.num_key_value_heads, head_dim(config))
    parts = [f"{attention}{name}_proj.{kind}" for name in "qkv"]
    names = {
        "shared_layernorm": "input_layernorm",
        "self_attention.linear_proj": "self_attn.dense",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    rows = [
        Weight(f"decoder.final_layernorm.{kind}", (f"model.final_layernorm.{kind}",)),
        *per_layer(layers, f"{MEGATRON_LAYER}self_attention.linear_qkv.{kind}", *parts, runs=qkv),
    ]
    for name, hf_name in names.items():
        rows += per_layer(layers, f"{MEGATRON_LAYER}{name}.{kind}", f"{HF_LAYER}{hf_name}.{kind}")
    if kind == "weight":
        embedding = "model.embed_tokens.weight"
        rows.append(Weight("embedding.word_embeddings.weight", (embedding,), rows=config.vocab_size))
    if kind == "bias" or not config.tie_word_embeddings:
        rows.append(Weight(f"output_layer.{kind}", (f"lm_head.{kind}",), rows=config.vocab_size))
    return rows


def phi3_flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a Phi-3 config."""
    return decoder_flags(config, rope=rope_flags(config, partial_rotary=True))


def phi3_weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a Phi-3 config."""
    layers, attention = layers_of(config), MEGATRON_LAYER + "self_attention."
    qkv = fused_query_key_value(config.num_attention_heads, config.num_key_value_heads, head_dim(config))
    return [
        *outer_weights(config),
        *norm_weights(config),
        *per_layer(layers, attention + "linear_qkv.weight", HF_LAYER + "self_attn.qkv_proj.weight", runs=qkv),
        *per_layer(layers, attention + "linear_proj.weight", HF_LAYER + "self_attn.o_proj.weight"),
        *per_layer(layers, MEGATRON_LAYER + "mlp.linear_fc1.weight", HF_LAYER + "mlp.gate_up_proj.weight"),
        *per_layer(layers, MEGATRON_LAYER + "mlp.linear_fc2.weight", HF_LAYER + "mlp.down_proj.weight"),
    ]
