# SPDX-License-Identifier: Apache-2.0
"""What the decoders of most architectures share: flags and tables of Llama's family."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_smar.checkpoint.weights import Weight, per_layer, query_key_value, stacked

Flags = dict[str, Any]  # Megatron's and our flags without their dashes; True: a switch; None or False: left out


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
        value = getattr(config, field, allowed[0])
        if value not in allowed:
            raise UnsupportedError(
                f"{field} is {value!r} in the config of this {config.model_type} model; "
                f"only {' or '.join(map(repr, allowed))} can be trained here."
            )


def head_dim(config: PretrainedConfig) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_flags(config: PretrainedConfig) -> Flags:
    """Flags of a pre-norm decoder with RMSNorm, rotary positions, grouped queries and SwiGLU."""
    return {
        "num-layers": config.num_hidden_layers,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.intermediate_size,
        "num-attention-heads": config.num_attention_heads,
        "group-query-attention": config.num_key_value_heads != config.num_attention_heads,
        "num-query-groups": config.num_key_value_heads,
        "kv-channels": head_dim(config),
        "max-position-embeddings": config.max_position_embeddings,
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "untie-embeddings-and-output-weights": not config.tie_word_embeddings,
        **rope_flags(config),
    }


def rope_flags(config: PretrainedConfig) -> Flags:
    """Flags of the rotary position embedding."""
    rope = config.rope_parameters
    refuse_rope(config, rope.get("rope_type", "default"))
    return {"position-embedding-type": "rope", "rotary-base": int(rope["rope_theta"])}


def refuse_rope(config: PretrainedConfig, kind: str, supported: tuple[str, ...] = ("default",)) -> None:
    """Refuses scalings of the rotary embedding that Megatron does not have.

    Raises:
        UnsupportedError: Names the type.
    """
    if kind not in supported:
        raise UnsupportedError(
            f"rope_parameters has the type {kind!r} in the config of this {config.model_type} model; "
            f"supported are {', '.join(supported)}."
        )


def moe_flags(config: PretrainedConfig, experts: int, ffn: int, pre_softmax: bool) -> Flags:
    """Flags of the MoE layers.

    Args:
        config: The model's.
        experts: Number of experts per layer.
        ffn: An expert's hidden size.
        pre_softmax: Whether the weights are the softmax over all experts (not renormalised over the chosen ones).
    """
    return {
        "num-experts": experts,
        "moe-ffn-hidden-size": ffn,
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


def attention_weights(config: PretrainedConfig, bias: bool = False) -> list[Weight]:
    """Norms and attention of every layer.

    Args:
        config: The model's.
        bias: Whether queries, keys and values have biases.
    """
    layers = range(config.num_hidden_layers)
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention = ours + "self_attention.linear_", theirs + "self_attn."
    qkv = query_key_value(config.num_attention_heads, config.num_key_value_heads, head_dim(config))
    rows = []
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = [f"{attention[1]}{name}_proj.{kind}" for name in "qkv"]
        rows += per_layer(layers, f"{attention[0]}qkv.{kind}", *parts, runs=qkv)
    return [
        *rows,
        *per_layer(layers, attention[0] + "proj.weight", attention[1] + "o_proj.weight"),
        *per_layer(layers, ours + "input_layernorm.weight", theirs + "input_layernorm.weight"),
        *per_layer(layers, ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight"),
    ]


def expert_weights(
    config: PretrainedConfig, layers: range | list[int], experts: int, ffn: int, block: str, names: tuple[str, str, str]
) -> list[Weight]:
    """Router and experts.

    Args:
        config: The model's.
        layers: The layers that have experts.
        experts: How many each has.
        ffn: An expert's hidden size.
        block: Name of the MoE block in Hugging Face's layer.
        names: Of an expert's gate, up and down projection there.
    """
    ours, theirs = "decoder.layers.{layer}.mlp.", f"model.layers.{{layer}}.{block}."
    expert = ours + "experts.local_experts.{expert}.", theirs + "experts.{expert}."
    gate, up, down = (f"{expert[1]}{name}.weight" for name in names)
    return [
        *per_layer(layers, ours + "router.weight", theirs + "gate.weight"),
        *per_layer(layers, expert[0] + "linear_fc1.weight", gate, up, runs=stacked(ffn, ffn), experts=experts),
        *per_layer(layers, expert[0] + "linear_fc2.weight", down, experts=experts),
    ]
