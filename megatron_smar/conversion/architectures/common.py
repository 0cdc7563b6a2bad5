# SPDX-License-Identifier: Apache-2.0
"""Flags and weight tables that most decoders share: those of Llama's family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from megatron_smar.conversion.weights import Weight, per_layer, query_key_value, stacked

Flags = dict[str, Any]  # the trainer's flags without dashes; True: a switch that is on; None or False: left out

# Prefixes of a layer's weights in Megatron and in Hugging Face.
MEGATRON_LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


class UnsupportedError(ValueError):
    """The architecture, or a setting of it, has no exact counterpart here."""


def refuse(config: PretrainedConfig, **expected: Any) -> None:
    """Refuses settings that have no counterpart in the trainer.

    Args:
        config: The model's config.
        **expected: Fields, each with its supported value (or tuple of values); a missing field passes.

    Raises:
        UnsupportedError: A field has another value; the message names field, value and what is supported.
    """
    for field, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        require(config, field, getattr(config, field, allowed[0]), allowed)


def require(config: PretrainedConfig, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a setting whose value is not among the allowed ones.

    Raises:
        UnsupportedError: The value is not allowed; the message names field, value and what is supported.
    """
    if value not in allowed:
        raise UnsupportedError(
            f"{field} is {value!r} in the config of this {config.model_type} model; "
            f"only {' or '.join(map(repr, allowed))} can be trained here."
        )


def head_dim(config: PretrainedConfig) -> int:
    """Returns the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layers_of(config: PretrainedConfig) -> range:
    """Returns the layers' numbers, from 0."""
    return range(config.num_hidden_layers)


def shape_flags(config: PretrainedConfig) -> Flags:
    """Returns the shape flags of any decoder with rotary position embeddings.

    Sliding-window attention equals full attention as long as no sequence is longer than the window, which the trainer
    ensures by --max-position-embeddings. Dropout belongs to training, not to the model: it is off unless the user gives
    its flags again.
    """
    window = getattr(config, "sliding_window", None)
    return {
        "num-layers": config.num_hidden_layers,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.intermediate_size,
        "num-attention-heads": config.num_attention_heads,
        "group-query-attention": config.num_key_value_heads != config.num_attention_heads,
        "num-query-groups": config.num_key_value_heads,
        "kv-channels": head_dim(config),
        "max-position-embeddings": min(config.max_position_embeddings, window or config.max_position_embeddings),
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "untie-embeddings-and-output-weights": not config.tie_word_embeddings,
        "position-embedding-type": "rope",
    }


def decoder_flags(config: PretrainedConfig, rope: Flags | None = None) -> Flags:
    """Returns the flags of a pre-norm decoder with RMSNorm, rotary position embeddings, grouped queries and SwiGLU.

    Args:
        config: The model's config.
        rope: Flags of the rotary position embedding; None for those of `rope_flags`.
    """
    refuse(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return {
        **shape_flags(config),
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        **(rope_flags(config) if rope is None else rope),
    }


def rope_flags(config: PretrainedConfig, partial_rotary: bool = False) -> Flags:
    """Returns the flags of the rotary position embedding: unscaled, scaled linearly, or scaled as in Llama 3.

    Args:
        config: The model's config.
        partial_rotary: Whether the architecture can rotate only a part of each head.
    """
    rope = config.rope_parameters
    kind, percent = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    require(config, "rope_type in rope_parameters", kind, ("default", "linear", "llama3"))
    if not partial_rotary:
        require(config, "partial_rotary_factor in rope_parameters", percent, (1.0,))
    flags: Flags = {"rotary-base": rope_theta(config), "rotary-percent": percent if percent != 1.0 else None}
    if kind == "linear":
        factor = rope_field(config, "factor")
        require(config, "factor in rope_parameters", factor, (int(factor),))  # the flag takes integers
        flags["rotary-seq-len-interpolation-factor"] = int(factor)
    if kind == "llama3":
        published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        for field, value in published.items():  # hard-coded in Megatron
            require(config, f"{field} in rope_parameters", rope_field(config, field), (value,))
        flags |= {"use-rope-scaling": True, "rope-scaling-factor": rope_field(config, "factor")}
    return flags


def rope_field(config: PretrainedConfig, field: str) -> Any:
    """Returns a setting that the rotary embedding's type needs.

    Raises:
        UnsupportedError: The setting is missing.
    """
    value = config.rope_parameters.get(field)
    if value is None:
        raise UnsupportedError(
            f"{field} is missing from rope_parameters in the config of this {config.model_type} model; its rope_type "
            f"{config.rope_parameters.get('rope_type')!r} needs it."
        )
    return value


def rope_theta(config: PretrainedConfig) -> int:
    """Returns --rotary-base, which must be an integer."""
    theta = rope_field(config, "rope_theta")
    require(config, "rope_theta in rope_parameters", theta, (int(theta),))
    return int(theta)


def moe_flags(
    config: PretrainedConfig, experts: int, ffn: int, pre_softmax: bool, moe_layers: Iterable[int] | None = None
) -> Flags:
    """Returns the flags of the MoE layers.

    Args:
        config: The model's config.
        experts: Number of experts per layer.
        ffn: FFN hidden size of an expert.
        pre_softmax: Whether the weights are the softmax over all experts (not renormalized over the chosen ones).
        moe_layers: Numbers of the MoE layers; None for all layers.
    """
    layers = layers_of(config)
    pattern = [int(moe_layers is None or layer in set(moe_layers)) for layer in layers]
    return {
        "num-experts": experts,
        "moe-ffn-hidden-size": ffn,
        "moe-layer-freq": None if all(pattern) else str(pattern).replace(" ", ""),
        "moe-router-topk": config.num_experts_per_tok,
        "moe-router-pre-softmax": pre_softmax,
        "moe-router-load-balancing-type": "none",
        "moe-token-dispatcher-type": "alltoall",
    }


def outer_weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the table of embedding, final norm and output layer."""
    vocabulary = config.vocab_size
    rows = [
        Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rows=vocabulary),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        rows.append(Weight("output_layer.weight", ("lm_head.weight",), rows=vocabulary))
    return rows


def attention_weights(config: PretrainedConfig, bias: bool = False, qk_norm: bool = False) -> list[Weight]:
    """Returns the table of the norms and the attention of every layer.

    Args:
        config: The model's config.
        bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys have norms.
    """
    layers, megatron, hf = layers_of(config), MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    qkv = query_key_value(config.num_attention_heads, config.num_key_value_heads, head_dim(config))
    rows = norm_weights(config)
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = [f"{hf}{name}_proj.{kind}" for name in "qkv"]
        rows += per_layer(layers, f"{megatron}linear_qkv.{kind}", *parts, runs=qkv)
    for name in "qk" if qk_norm else "":
        rows += per_layer(layers, f"{megatron}{name}_layernorm.weight", f"{hf}{name}_norm.weight")
    return rows + per_layer(layers, megatron + "linear_proj.weight", hf + "o_proj.weight")


def norm_weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the table of the two norms of every layer."""
    layers = layers_of(config)
    return [
        *per_layer(layers, MEGATRON_LAYER + "input_layernorm.weight", HF_LAYER + "input_layernorm.weight"),
        *per_layer(layers, MEGATRON_LAYER + "pre_mlp_layernorm.weight", HF_LAYER + "post_attention_layernorm.weight"),
    ]


def dense_weights(layers: Iterable[int], ffn: int, place: str = "mlp", block: str = "mlp") -> list[Weight]:
    """Returns the table of a gated feed-forward block: that of dense layers, or the shared experts.

    Args:
        layers: Numbers of the layers that have the block.
        ffn: FFN hidden size of the block.
        place: The block's name in Megatron's layer.
        block: The block's name in Hugging Face's layer.
    """
    layers = list(layers)
    gate, up, down = (f"{HF_LAYER}{block}.{name}.weight" for name in GATE_UP_DOWN)
    return [
        *per_layer(layers, f"{MEGATRON_LAYER}{place}.linear_fc1.weight", gate, up, runs=stacked(ffn, ffn)),
        *per_layer(layers, f"{MEGATRON_LAYER}{place}.linear_fc2.weight", down),
    ]


def expert_weights(
    layers: Iterable[int], experts: int, ffn: int, block: str = "mlp", names: tuple[str, str, str] = GATE_UP_DOWN
) -> list[Weight]:
    """Returns the table of router and experts.

    Args:
        layers: Numbers of the MoE layers.
        experts: Number of experts per layer.
        ffn: FFN hidden size of an expert.
        block: Name of the MoE block in Hugging Face's layer.
        names: Names of an expert's gate, up and down projection in Hugging Face's block.
    """
    layers = list(layers)
    megatron, hf = MEGATRON_LAYER + "mlp.", f"{HF_LAYER}{block}."
    megatron_expert, hf_expert = megatron + "experts.local_experts.{expert}.", hf + "experts.{expert}."
    gate, up, down = (f"{hf_expert}{name}.weight" for name in names)
    return [
        *per_layer(layers, megatron + "router.weight", hf + "gate.weight"),
        *per_layer(layers, megatron_expert + "linear_fc1.weight", gate, up, runs=stacked(ffn, ffn), experts=experts),
        *per_layer(layers, megatron_expert + "linear_fc2.weight", down, experts=experts),
    ]
