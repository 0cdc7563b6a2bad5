# SPDX-License-Identifier: Apache-2.0
"""The decoder's layer specs: Megatron's own, with our parts in their places."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smar.model.local_layers import LocalExperts, ScaledDotProductAttention, build_norm
from megatron_smar.routing.moe_layer import ModalityAwareMoELayer
from megatron_smar.routing.router import ModalityAwareRouter, ModalityRoutingConfig


def decoder_block_spec(
    config: TransformerConfig, modality_routing: ModalityRoutingConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage, with modality-aware MoE layers.

    Transformer Engine's spec or Megatron's local one, by `config.transformer_impl`; in the local one attention, norms
    and experts are ours (see `local_layers`).
    """
    local = config.transformer_impl == "local"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization=config.normalization, vp_stage=vp_stage
    )
    layers = [_extended(layer, modality_routing, local) for layer in block.layer_specs]
    return dataclasses.replace(block, layer_specs=layers, layer_norm=build_norm if local else block.layer_norm)


def _extended(layer: ModuleSpec, modality_routing: ModalityRoutingConfig, local: bool) -> ModuleSpec:
    parts = dataclasses.replace(layer.submodules, mlp=_modality_aware(layer.submodules.mlp, modality_routing, local))
    if local:
        attention = parts.self_attention
        inner = dataclasses.replace(attention.submodules, core_attention=ScaledDotProductAttention)
        inner = _with_norms(inner, ("q_layernorm", "k_layernorm", "kv_layernorm"), parts.input_layernorm)
        parts = _with_norms(parts, ("input_layernorm", "pre_mlp_layernorm"), parts.input_layernorm)
        parts.self_attention = dataclasses.replace(attention, submodules=inner)
    return dataclasses.replace(layer, submodules=parts)


def _with_norms(parts: Any, names: tuple[str, ...], replaced: Any) -> Any:
    """The same submodules with every norm of Megatron's local spec (and no IdentityOp) taken over by ours."""
    held = [name for name in names if getattr(parts, name, None) is replaced]
    return dataclasses.replace(parts, **dict.fromkeys(held, build_norm))


def _modality_aware(mlp: Any, modality_routing: ModalityRoutingConfig, local: bool) -> Any:
    """An MoE layer's builder with our layer, router and (locally) experts; a dense layer's builder as it is."""
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return mlp
    parts = mlp.keywords["submodules"]
    experts = parts.experts
    if local and isinstance(experts, partial) and experts.func is SequentialMLP:
        experts = partial(LocalExperts, *experts.args, **experts.keywords)
    router = partial(ModalityAwareRouter, modality_routing=modality_routing)
    return partial(ModalityAwareMoELayer, submodules=dataclasses.replace(parts, router=router, experts=experts))
