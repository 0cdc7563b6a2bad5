# SPDX-License-Identifier: Apache-2.0
"""The shape of a run's model, from Megatron's config and the vision tower's: what its cost depends on."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from transformers import PretrainedConfig

from megatron_smar.config.build import RunConfig
from megatron_smar.config.checks import moe_layers
from megatron_smar.model.parts import LANGUAGE_PARTS, frozen_parts
from megatron_smar.model.vision import load_vision_config, side_in_pixels
from megatron_smar.planning.shape import DecoderShape, ModelShape, VisionShape


def model_shape(run: RunConfig, config: TransformerConfig) -> ModelShape:
    """Returns the shape of a run's model.

    Args:
        run: The run's configs.
        config: Megatron's config of the language model.
    """
    tower = load_vision_config(run.vision)
    trained = frozenset(("vision", "connector", *LANGUAGE_PARTS)) - frozen_parts(run.freeze)
    return ModelShape(
        decoder_shape(config, run.language.vocab_size), vision_shape(tower, run.vision.shuffle_step), trained
    )


def decoder_shape(config: TransformerConfig, vocabulary: int) -> DecoderShape:
    """Returns the shape of a language model.

    Args:
        config: Megatron's config.
        vocabulary: Rows of the output layer.
    """
    matrices = 3 if config.gated_linear_unit else 2
    latent = config.moe_latent_size
    with_experts = moe_layers(config) if config.num_moe_experts else []
    weights, width = _attention(config)
    return DecoderShape(
        hidden=config.hidden_size,
        moe_layers=tuple(number in with_experts for number in range(1, config.num_layers + 1)),
        attention_weights=weights,
        score_width=width,
        dense_weights=matrices * config.hidden_size * config.ffn_hidden_size,
        expert_weights=matrices
        * (latent or config.hidden_size)
        * (config.moe_ffn_hidden_size or config.ffn_hidden_size),
        shared_weights=config.hidden_size
        * (matrices * (config.moe_shared_expert_intermediate_size or 0) + 2 * (latent or 0)),
        experts=config.num_moe_experts or 0,
        top_k=config.moe_router_topk,
        vocabulary=vocabulary,
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
        layer_weights=4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size,
        patches=patches,
        extra_tokens=0 if tower.model_type == "siglip_vision_model" else 1,  # InternViT and CLIP have a class token
        patch_values=3 * patch**2,
        tokens=patches // shuffle_step**2,
    )
