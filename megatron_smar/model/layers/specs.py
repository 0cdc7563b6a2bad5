# SPDX-License-Identifier: Apache-2.0
"""The decoder's layer specs: Megatron's own, with this project's modules in place of some of Megatron's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron.core.models.backends import get_backend
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_smar.model.layers.latent_attention import LatentAttention
from megatron_smar.model.layers.local_attention import LocalSelfAttention, ScaledDotProductAttention
from megatron_smar.model.layers.local_experts import LocalExperts
from megatron_smar.model.layers.norms import ProjectionNorm, build_norm
from megatron_smar.model.layers.parallel_block import ParallelBlockLayer
from megatron_smar.model.layers.score_layer import SCORE_LAYERS
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.moe_layer import ModalityAwareMoELayer
from megatron_smar.routing.router import ModalityAwareRouter
from megatron_smar.routing.step import TrainingStep


@dataclass(frozen=True)
class LayerConfig:
    """Settings of the decoder's layers that Megatron's TransformerConfig does not have.

    Attributes:
        parallel_block: Whether the attention and the feed-forward layer run in parallel, after one shared norm (Phi).
        qk_norm_scope: What --qk-layernorm normalizes over: each head, or all heads together (OLMoE).
        latent_norm_epsilon: Epsilon of the norms of multi-latent attention; None for --norm-epsilon.
        skips_unused: Whether training computes the last layer's experts only at positions whose loss counts.
    """

    parallel_block: bool = False
    qk_norm_scope: Literal["head", "projection"] = "head"
    latent_norm_epsilon: float | None = None
    skips_unused: bool = False


def decoder_block_spec(
    config: TransformerConfig,
    modality_routing: ModalityRoutingConfig,
    vp_stage: int | None = None,
    layers: LayerConfig | None = None,
    step: TrainingStep | None = None,
) -> TransformerBlockSubmodules:
    """Returns the specs of this pipeline stage's decoder layers, with modality-aware MoE layers.

    `config.transformer_impl` selects Transformer Engine's spec or Megatron's local spec. The local spec uses this
    project's attention, norms and experts (`local_attention`, `norms`, `local_experts`). Checkpoints have the same keys
    under both.
    """
    local = config.transformer_impl == "local"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization=config.normalization, vp_stage=vp_stage
    )
    router = partial(ModalityAwareRouter, modality_routing=modality_routing, step=step)
    specs = [_extended(layer, config, router, layers or LayerConfig()) for layer in block.layer_specs]
    if modality_routing.strategy.needs_attention_scores:
        specs = [dataclasses.replace(layer, module=SCORE_LAYERS[layer.module]) for layer in specs]
    return dataclasses.replace(block, layer_specs=specs, layer_norm=_as_saved(block.layer_norm, config))


def _extended(
    layer: ModuleSpec, config: TransformerConfig, router: Callable[..., ModalityAwareRouter], layers: LayerConfig
) -> ModuleSpec:
    local = config.transformer_impl == "local"
    parts = layer.submodules
    attention = _attention(parts.self_attention, config, layers)
    mlp = _modality_aware(parts.mlp, router, local, layers.skips_unused)
    parts = dataclasses.replace(parts, self_attention=attention, mlp=mlp)
    parts = _with_norms(parts, ("input_layernorm", "pre_mlp_layernorm"), config)
    if local:
        parts.sharded_state_dict_keys_map = _transformer_engine_keys(config, _is_moe(layer.submodules.mlp))
    return _parallel(parts, config) if layers.parallel_block else dataclasses.replace(layer, submodules=parts)


def _attention(attention: ModuleSpec, config: TransformerConfig, layers: LayerConfig) -> ModuleSpec:
    """Returns the attention's spec with this project's norms and, under the local spec, core attention."""
    module = attention.module
    inner = _with_norms(attention.submodules, ("q_layernorm", "k_layernorm", "kv_layernorm"), config)
    if config.transformer_impl == "local":
        inner = dataclasses.replace(inner, core_attention=ScaledDotProductAttention)
        module = LocalSelfAttention if module is SelfAttention else module
    if config.qk_layernorm and module is MLASelfAttention:
        norm = _of_epsilon(_norm(config), layers.latent_norm_epsilon)
        linear = get_backend(config.transformer_impl).column_parallel_linear()
        inner = dataclasses.replace(
            inner, q_layernorm=norm, kv_layernorm=norm, linear_q_up_proj=linear, linear_kv_up_proj=linear
        )
        module = LatentAttention
    elif config.qk_layernorm and layers.qk_norm_scope == "projection":
        inner = dataclasses.replace(
            inner,
            q_layernorm=partial(ProjectionNorm, heads=config.num_attention_heads),
            k_layernorm=partial(ProjectionNorm, heads=config.num_query_groups),
        )
    return dataclasses.replace(attention, module=module, submodules=inner)


def _parallel(parts: TransformerLayerSubmodules, config: TransformerConfig) -> ModuleSpec:
    """Returns the spec of a layer with parallel attention and feed-forward layer.

    Neither of the two has a norm of its own, be it separate or fused into a linear layer.
    """
    linear = get_backend(config.transformer_impl).column_parallel_linear()
    attention = parts.self_attention
    attention = dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, linear_qkv=linear))
    mlp = parts.mlp
    if isinstance(mlp, partial) and isinstance(mlp.keywords["submodules"], MLPSubmodules):
        mlp = partial(mlp, submodules=dataclasses.replace(mlp.keywords["submodules"], linear_fc1=linear))
    parts = dataclasses.replace(
        parts,
        self_attention=attention,
        mlp=mlp,
        input_layernorm=IdentityOp,
        pre_mlp_layernorm=IdentityOp,
        sharded_state_dict_keys_map={},
    )
    return ModuleSpec(module=ParallelBlockLayer, params={"shared_layernorm": _norm(config)}, submodules=parts)


def _norm(config: TransformerConfig) -> LayerNormBuilder:
    """Returns the builder of a norm that is not fused into a linear layer."""
    backend = get_backend(config.transformer_impl)
    return _as_saved(backend.layer_norm(rms_norm=config.normalization == "RMSNorm"), config)


def _as_saved(build: LayerNormBuilder, config: TransformerConfig) -> LayerNormBuilder:
    """Returns the builder of a norm that is saved without extra state.

    Megatron's local norm is replaced by `build_norm`; the extra state of Transformer Engine's norms is left out of
    checkpoints. The extra state is for FP8, and that of a norm is empty. But a model with Transformer Engine's layers
    expects it in every checkpoint, and could not load those that lack it: those of local layers, and all imported ones.
    """
    if config.transformer_impl == "local":
        return build_norm

    def build_with(*args: Any, **kwargs: Any) -> Any:
        norm = build(*args, **kwargs)
        norm.register_state_dict_post_hook(_drop_extra_state)
        norm.register_load_state_dict_pre_hook(_give_extra_state)
        return norm

    return build_with


def _drop_extra_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _give_extra_state(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Sets the extra state to None if it is missing: a missing key would be an error."""
    state.setdefault(f"{prefix}_extra_state")


def _of_epsilon(build: LayerNormBuilder, epsilon: float | None) -> LayerNormBuilder:
    """Wraps a norm's builder to use `epsilon`, if given, instead of the layer's."""

    def build_with(*, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        return build(config=config, hidden_size=hidden_size, eps=eps if epsilon is None else epsilon)

    return build_with


def _with_norms(parts: Any, names: tuple[str, ...], config: TransformerConfig) -> Any:
    """Returns the submodules with `_as_saved` applied to each named norm, except where there is none (IdentityOp)."""
    held = {name: build for name in names if (build := getattr(parts, name, None)) not in (None, IdentityOp)}
    return dataclasses.replace(parts, **{name: _as_saved(build, config) for name, build in held.items()})


def _transformer_engine_keys(config: TransformerConfig, is_moe: bool) -> dict[str, str]:
    """Returns the map from the local layer's norm keys to the keys of Transformer Engine's layer in a checkpoint.

    Megatron 0.19.2's own map is right only for dense layers without multi-latent attention: in Transformer Engine's
    spec the norms before `linear_qkv` and `linear_fc1` are fused into these linear layers, but the norms before an MoE
    layer and before multi-latent attention are separate modules.
    """
    keys = {} if config.multi_latent_attention else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return keys if is_moe else keys | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _is_moe(mlp: Any) -> bool:
    return isinstance(mlp, partial) and mlp.func is MoELayer


def _modality_aware(mlp: Any, router: Callable[..., ModalityAwareRouter], local: bool, skips_unused: bool) -> Any:
    """Returns an MoE layer's builder with this project's layer, router and, under the local spec, experts.

    A dense layer's builder is returned unchanged.
    """
    if not _is_moe(mlp):
        return mlp
    parts = mlp.keywords["submodules"]
    experts = parts.experts
    if local and isinstance(experts, partial) and experts.func is SequentialMLP:
        experts = partial(LocalExperts, *experts.args, **experts.keywords)
    parts = dataclasses.replace(parts, router=router, experts=experts)
    return partial(ModalityAwareMoELayer, submodules=parts, skips_unused=skips_unused)
