# SPDX-License-Identifier: Apache-2.0
"""Tests that every convertible architecture is built of Transformer Engine's layers, without local replacements."""

from typing import Any

import pytest

from tests.te.building import MODELS, build, parse

EXPERTS = {"one after another": [], "grouped": ["--moe-grouped-gemm"]}


def decoder(name: str, tower: str, *flags: str) -> Any:
    """Returns the decoder layers of the complete model."""
    return build(parse(name, tower, *flags)).language_model.decoder.layers


def assert_no_local_layer(layers: Any) -> None:
    """Asserts that no module is one of Megatron's local layers or of this project's replacements for them."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_smar.model.layers import local_attention, local_experts

    own = tuple(
        part
        for module in (local_attention, local_experts)
        for part in vars(module).values()
        if isinstance(part, type) and part.__module__ == module.__name__
    )
    assert len(own) > 2
    local_layers = (ColumnParallelLinear, RowParallelLinear, DotProductAttention, WrappedTorchNorm, *own)
    for layer in layers:
        found = [name for name, part in layer.named_modules() if isinstance(part, local_layers)]
        assert not found, found


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_complete_model_is_built_of_transformer_engine_layers(name, experts, one_rank, tower):
    from megatron.core.extensions import transformer_engine as te

    layers = decoder(name, tower, *EXPERTS[experts])
    assert_no_local_layer(layers)
    for layer in layers:
        assert isinstance(layer.self_attention.core_attention, te.TEDotProductAttention)
        assert isinstance(layer.self_attention.linear_proj, te.TERowParallelLinear)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "phi, upcycled"])
def test_experts_are_transformer_engines(name, experts, one_rank, tower):
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

    from megatron_smar.routing.moe_layer import ModalityAwareMoELayer
    from megatron_smar.routing.router import ModalityAwareRouter

    mlp = decoder(name, tower, *EXPERTS[experts])[-1].mlp
    assert isinstance(mlp, ModalityAwareMoELayer) and isinstance(mlp.router, ModalityAwareRouter)
    if experts == "grouped":
        assert isinstance(mlp.experts, TEGroupedMLP)
        assert isinstance(mlp.experts.linear_fc1, te.TEColumnParallelGroupedLinear)
    else:
        assert isinstance(mlp.experts, SequentialMLP)
        assert isinstance(mlp.experts.local_experts[0].linear_fc1, te.TEColumnParallelLinear)
    assert not any(parameter.allreduce for parameter in mlp.experts.parameters())


def test_norms_of_dense_layers_are_fused_into_the_linear_layers(one_rank, tower):
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in decoder("llama, version 3", tower):
        assert isinstance(layer.self_attention.linear_qkv, te.TELayerNormColumnParallelLinear)
        assert isinstance(layer.mlp.linear_fc1, te.TELayerNormColumnParallelLinear)
        assert isinstance(layer.input_layernorm, IdentityOp) and isinstance(layer.pre_mlp_layernorm, IdentityOp)


def test_norms_of_queries_and_keys_are_per_head_or_per_projection(one_rank, tower):
    import transformer_engine.pytorch as te

    from megatron_smar.model.layers.norms import ProjectionNorm

    head = decoder("qwen3", tower)[0].self_attention
    assert isinstance(head.q_layernorm, te.RMSNorm) and head.k_layernorm.weight.shape == (16,)
    projection = decoder("olmoe, grouped queries, renormalized", tower)[0].self_attention
    assert isinstance(projection.q_layernorm, ProjectionNorm)
    assert (projection.q_layernorm.weight.shape, projection.k_layernorm.weight.shape) == ((32,), (16,))


@pytest.mark.parametrize("name", ["deepseek_v2, Lite", "deepseek_v2, latent queries, groups", "deepseek_v3"])
def test_latent_attention_has_only_the_norms_of_its_latents(name, one_rank, tower):
    import transformer_engine.pytorch as te
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.transformer.identity_op import IdentityOp

    args = parse(name, tower, "--latent-norm-epsilon", "0.125")
    for layer in build(args).language_model.decoder.layers:
        attention = layer.self_attention
        assert isinstance(layer.input_layernorm, te.RMSNorm) and isinstance(attention.kv_layernorm, te.RMSNorm)
        assert attention.kv_layernorm.eps == 0.125 != layer.input_layernorm.eps
        assert isinstance(attention.linear_kv_up_proj, extension.TEColumnParallelLinear)
        if args.q_lora_rank is None:
            assert isinstance(attention.linear_q_proj, extension.TEColumnParallelLinear)
        else:
            assert isinstance(attention.linear_q_up_proj, extension.TEColumnParallelLinear)
            assert isinstance(attention.q_layernorm, te.RMSNorm)
        assert not isinstance(layer.input_layernorm, IdentityOp)


def test_shared_experts_are_transformer_engines(one_rank, tower):
    from megatron.core.extensions import transformer_engine as te

    shared = decoder("deepseek_v3", tower, "--moe-grouped-gemm")[-1].mlp.shared_experts
    assert isinstance(shared.linear_fc1, te.TEColumnParallelLinear)
    assert isinstance(shared.linear_fc2, te.TERowParallelLinear)


@pytest.mark.parametrize("name", ["phi", "phi, upcycled"])
def test_parallel_blocks_share_one_norm_and_have_biases(name, one_rank, tower):
    import transformer_engine.pytorch as te
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.transformer.identity_op import IdentityOp

    model = build(parse(name, tower, "--moe-grouped-gemm"))
    for layer in model.language_model.decoder.layers:
        assert isinstance(layer.shared_layernorm, te.LayerNorm) and layer.shared_layernorm.bias is not None
        assert isinstance(layer.input_layernorm, IdentityOp) and isinstance(layer.pre_mlp_layernorm, IdentityOp)
        assert type(layer.self_attention.linear_qkv) is extension.TEColumnParallelLinear
        assert layer.self_attention.linear_qkv.use_bias
        grouped = name == "phi, upcycled" and hasattr(layer.mlp, "experts")
        assert (layer.mlp.experts if grouped else layer.mlp).linear_fc1.use_bias
    assert model.language_model.output_layer.bias is not None
    assert not model.config.bias_activation_fusion, "fused kernels do not support GELU approximated by tanh"
