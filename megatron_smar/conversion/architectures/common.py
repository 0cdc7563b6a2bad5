# SPDX-License-Identifier: Apache-2.0
"""What the decoders of most architectures share: flags and tables of Llama's family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from megatron_smar.conversion.weights import Weight, per_layer, query_key_value, stacked

Flags = dict[str, Any]  # Megatron's and our flags without their dashes; True: a switch; None or False: left out

OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


class UnsupportedError(ValueError):
    """The architecture, or a setting of it, has no exact counterpart here."""


def refuse(config: PretrainedConfig, **expected: Any) -> None:
    """Refuses settings that have no counterpart in the trainer.

    Args:
        config: The model's.
        **expected: Fields and the one value (or tuple of values) that each may have; a field that is absent passes.

    Raises:
        UnsupportedError: Names the field, its value and what is supported.
    """
    for field, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        require(config, field, getattr(config, field, allowed[0]), allowed)


def require(config: PretrainedConfig, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a setting that has another value than these.

    Raises:
        UnsupportedError: Names the field, its value and what is supported.
    """
    if value not in allowed:
        raise UnsupportedError(
            f"{field} is {value!r} in the config of this {config.model_type} model; "
            f"only {' or '.join(map(repr, allowed))} can be trained here."
        )


def head_dim(config: PretrainedConfig) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layers_of(config: PretrainedConfig) -> range:
    """Numbers of the layers, from 0."""
    return range(config.num_hidden_layers)


def shape_flags(config: PretrainedConfig) -> Flags:
    """Flags of any decoder with rotary positions: its shape.

    Attention within a window is exact without one for as long as no sequence is longer than it, which the trainer sees
    to by --max-position-embeddings. Dropout is a matter of training, not of the model: it is off unless the user gives
    the flags again.
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
    """Flags of a pre-norm decoder with RMSNorm, rotary positions, grouped queries and SwiGLU.

    Args:
        config: The model's.
        rope: Of the rotary position embedding; None for `rope_flags`.
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
    """Flags of the rotary position embedding: as it is, scaled linearly, or Llama 3's way.

    Args:
        config: The model's.
        partial_rotary: Whether the architecture can rotate a part of each head only.
    """
    rope = config.rope_parameters
    kind, percent = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    require(config, "rope_type in rope_parameters", kind, ("default", "linear", "llama3"))
    if not partial_rotary:
        require(config, "partial_rotary_factor in rope_parameters", percent, (1.0,))
    flags: Flags = {"rotary-base": rope_theta(config), "rotary-percent": percent if percent != 1.0 else None}
    if kind == "linear":
        factor = rope_field(config, "factor")
        require(config, "factor in rope_parameters", factor, (int(factor),))  # the flag takes whole numbers
        flags["rotary-seq-len-interpolation-factor"] = int(factor)
    if kind == "llama3":
        published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        for field, value in published.items():  # Megatron has them built in
            require(config, f"{field} in rope_parameters", rope_field(config, field), (value,))
        flags |= {"use-rope-scaling": True, "rope-scaling-factor": rope_field(config, "factor")}
    return flags


def rope_field(config: PretrainedConfig, field: str) -> Any:
    """A setting of the rotary embedding that its type needs.

    Raises:
        UnsupportedError: It is missing.
    """
    value = config.rope_parameters.get(field)
    if value is None:
        raise UnsupportedError(
            f"{field} is missing from rope_parameters in the config of this {config.model_type} model; its rope_type "
            f"{config.rope_parameters.get('rope_type')!r} needs it."
        )
    return value


def rope_theta(config: PretrainedConfig) -> int:
    """--rotary-base, which takes whole numbers."""
    theta = rope_field(config, "rope_theta")
    require(config, "rope_theta in rope_parameters", theta, (int(theta),))
    return int(theta)


def moe_flags(
    config: PretrainedConfig, experts: int, ffn: int, pre_softmax: bool, moe_layers: Iterable[int] | None = None
) -> Flags:
    """Flags of the MoE layers.

    Args:
        config: The model's.
        experts: Number of experts per layer.
        ffn: An expert's hidden size.
        pre_softmax: Whether the weights are the softmax over all experts (not renormalised over the chosen ones).
        moe_layers: The layers that have experts; None for all.
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
    """Embedding, final norm, output layer."""
    vocabulary = config.vocab_size
    rows = [
        Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rows=vocabulary),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        rows.append(Weight("output_layer.weight", ("lm_head.weight",), rows=vocabulary))
    return rows


def attention_weights(config: PretrainedConfig, bias: bool = False, qk_norm: bool = False) -> list[Weight]:
    """Norms and attention of every layer.

    Args:
        config: The model's.
        bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys have norms.
    """
    layers, ours, theirs = layers_of(config), OURS + "self_attention.", THEIRS + "self_attn."
    qkv = query_key_value(config.num_attention_heads, config.num_key_value_heads, head_dim(config))
    rows = norm_weights(config)
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = [f"{theirs}{name}_proj.{kind}" for name in "qkv"]
        rows += per_layer(layers, f"{ours}linear_qkv.{kind}", *parts, runs=qkv)
    for name in "qk" if qk_norm else "":
        rows += per_layer(layers, f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight")
    return rows + per_layer(layers, ours + "linear_proj.weight", theirs + "o_proj.weight")


def norm_weights(config: PretrainedConfig) -> list[Weight]:
    """The two norms of every layer."""
    layers = layers_of(config)
    return [
        *per_layer(layers, OURS + "input_layernorm.weight", THEIRS + "input_layernorm.weight"),
        *per_layer(layers, OURS + "pre_mlp_layernorm.weight", THEIRS + "post_attention_layernorm.weight"),
    ]


def dense_weights(layers: Iterable[int], ffn: int, place: str = "mlp", block: str = "mlp") -> list[Weight]:
    """A feed-forward layer of gate, up and down projection: a dense layer's, or the shared experts'.

    Args:
        layers: The layers that have one.
        ffn: Its hidden size.
        place: Its name in Megatron's layer.
        block: Its name in Hugging Face's layer.
    """
    layers = list(layers)
    gate, up, down = (f"{THEIRS}{block}.{name}.weight" for name in GATE_UP_DOWN)
    return [
        *per_layer(layers, f"{OURS}{place}.linear_fc1.weight", gate, up, runs=stacked(ffn, ffn)),
        *per_layer(layers, f"{OURS}{place}.linear_fc2.weight", down),
    ]


def expert_weights(
    layers: Iterable[int], experts: int, ffn: int, block: str = "mlp", names: tuple[str, str, str] = GATE_UP_DOWN
) -> list[Weight]:
    """Router and experts.

    Args:
        layers: The layers that have experts.
        experts: How many each has.
        ffn: An expert's hidden size.
        block: Name of the MoE block in Hugging Face's layer.
        names: Of an expert's gate, up and down projection there.
    """
    layers = list(layers)
    ours, theirs = OURS + "mlp.", f"{THEIRS}{block}."
    expert = ours + "experts.local_experts.{expert}.", theirs + "experts.{expert}."
    gate, up, down = (f"{expert[1]}{name}.weight" for name in names)
    return [
        *per_layer(layers, ours + "router.weight", theirs + "gate.weight"),
        *per_layer(layers, expert[0] + "linear_fc1.weight", gate, up, runs=stacked(ffn, ffn), experts=experts),
        *per_layer(layers, expert[0] + "linear_fc2.weight", down, experts=experts),
    ]
