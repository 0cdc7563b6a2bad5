# SPDX-License-Identifier: Apache-2.0
"""The shape of a run's model, from Megatron's config and the vision tower's: what its cost depends on."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import nn
from transformers import PretrainedConfig

from megatron_smar.config.checks import moe_layers
from megatron_smar.model.parts import LANGUAGE_PARTS, frozen_parts, part_of
from megatron_smar.model.vision import VisionConfig, load_vision_config, side_in_pixels
from megatron_smar.planning.shape import DecoderShape, LatentAttention, ModelShape, Parameter, VisionShape


def model_shape(
    vision: VisionConfig, freeze: Collection[str], vocabulary: int, config: TransformerConfig
) -> ModelShape:
    """Returns the shape of a run's model, without its parameters.

    Args:
        vision: The vision encoder's config.
        freeze: Frozen parts, as --freeze names them.
        vocabulary: Rows of the output layer.
        config: Megatron's config of the language model.
    """
    trained = frozenset(("vision", "connector", *LANGUAGE_PARTS)) - frozen_parts(freeze)
    tower = vision_shape(load_vision_config(vision), vision.shuffle_step)
    return ModelShape(decoder_shape(config, vocabulary), tower, trained)


def decoder_shape(config: TransformerConfig, vocabulary: int) -> DecoderShape:
    """Returns the shape of a language model.

    Args:
        config: Megatron's config.
        vocabulary: Rows of the output layer.
    """
    with_experts = moe_layers(config) if config.num_moe_experts else []
    weights, width = _attention(config)
    latent, groups = _latent_attention(config), config.num_query_groups or config.num_attention_heads
    return DecoderShape(
        hidden=config.hidden_size,
        moe_layers=tuple(number in with_experts for number in range(1, config.num_layers + 1)),
        attention_weights=weights,
        score_width=width,
        heads=config.num_attention_heads,
        query_groups=config.num_attention_heads if latent else groups,
        head_size=config.qk_head_dim + latent.rotary if latent else config.kv_channels,
        ffn=config.ffn_hidden_size,
        expert_ffn=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        shared_ffn=config.moe_shared_expert_intermediate_size or 0,
        latent=config.moe_latent_size or 0,
        gated=config.gated_linear_unit,
        experts=config.num_moe_experts or 0,
        top_k=config.moe_router_topk,
        vocabulary=vocabulary,
        has_biases=config.add_bias_linear,
        latent_attention=latent,
    )


def _latent_attention(config: TransformerConfig) -> LatentAttention | None:
    if not isinstance(config, MLATransformerConfig):
        return None
    return LatentAttention(
        rank=config.kv_lora_rank,
        query_rank=config.q_lora_rank or 0,
        rotary=config.qk_pos_emb_head_dim,
        value=config.v_head_dim,
    )


def _attention(config: TransformerConfig) -> tuple[int, int]:
    """Returns the weights of a layer's attention, and the numbers that it multiplies per query and key."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if isinstance(config, MLATransformerConfig):
        key = config.qk_head_dim + config.qk_pos_emb_head_dim
        width, rank = heads * (key + config.v_head_dim), config.kv_lora_rank
        queries = config.q_lora_rank * (hidden + heads * key) if config.q_lora_rank else hidden * heads * key
        keys = hidden * (rank + config.qk_pos_emb_head_dim) + rank * heads * (config.qk_head_dim + config.v_head_dim)
        return queries + keys + heads * config.v_head_dim * hidden, width
    queries, keys = heads * config.kv_channels, (config.num_query_groups or heads) * config.kv_channels
    gate = queries if config.attention_output_gate else 0
    return hidden * (2 * queries + 2 * keys + gate), 2 * queries


def vision_shape(tower: PretrainedConfig, shuffle_step: int) -> VisionShape:
    """Returns the shape of a vision encoder.

    Args:
        tower: The tower's Hugging Face config.
        shuffle_step: Patches per side that become one token.
    """
    patch = side_in_pixels(tower.patch_size)
    patches = (side_in_pixels(tower.image_size) // patch) ** 2
    return VisionShape(
        hidden=tower.hidden_size,
        layers=tower.num_hidden_layers,
        heads=tower.num_attention_heads,
        ffn=tower.intermediate_size,
        patches=patches,
        extra_tokens=0 if tower.model_type == "siglip_vision_model" else 1,  # InternViT and CLIP have a class token
        patch_values=3 * patch**2,
        tokens=patches // shuffle_step**2,
        scales_layers=tower.model_type == "internvl_vision",
    )


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """Lists the parameters of a whole model, built on one rank for bf16.

    Args:
        model: A `VisionLanguageModel` without parallelism; it may be on the meta device.
    """
    return tuple(
        Parameter(
            name=name,
            size=parameter.numel(),
            part=part_of(name),
            layer=_number(r"\.decoder\.layers\.(\d+)\.", name),
            tensor_parallel=getattr(parameter, "tensor_model_parallel", False),
            expert=_number(r"\.experts\.local_experts\.(\d+)\.", name),
            float32=parameter.dtype == torch.float32,
        )
        for name, parameter in model.named_parameters()
    )


def _number(pattern: str, name: str) -> int | None:
    found = re.search(pattern, name)
    return int(found[1]) if found else None
