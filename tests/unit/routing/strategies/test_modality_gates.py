# SPDX-License-Identifier: Apache-2.0
"""A gate per modality: which gate a token uses, what it learns from, and what it starts from."""

import numpy as np
import pytest
import torch

from megatron_smar.routing.strategies.modality_gates import ModalityGatesConfig
from tests.models import router_of

IMAGES = ("vision", "chart")


def gate_parameters(router):
    """Returns weights, and biases if there are any, of all gates."""
    return [parameter for name, parameter in router.named_parameters() if not name.startswith("modality_bias")]


def random_router(seed: int = 1, **config):
    """Returns a router in float64 with three random gates, an input [6, 2, 48], and the modality of each position."""
    router = router_of(ModalityGatesConfig(), IMAGES, **config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in gate_parameters(router):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    hidden = torch.randn(6, 2, 48, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [-1, 1], [0, -1], [2, 0]])
    return router, hidden, ids


def one_hot(ids: torch.Tensor) -> torch.Tensor:
    return ids.unsqueeze(-1) == torch.arange(3)


def gating(router, hidden, ids):
    router._modality_mask = one_hot(ids)
    return router.gating(hidden)


@pytest.mark.parametrize("bias", [False, True])
def test_each_token_has_the_logits_of_its_modalitys_gate_and_padding_those_of_texts(single_rank, bias):
    router, hidden, ids = random_router(add_bias_linear=bias)
    gates = [router, router.strategy.gates["1"], router.strategy.gates["2"]]
    expected = np.empty((6, 2, 4))
    for place in np.ndindex(6, 2):
        gate = gates[max(int(ids[place]), 0)]
        expected[place] = gate.weight.detach().numpy() @ hidden[place].numpy()
        expected[place] += gate.bias.detach().numpy() if bias else 0
    np.testing.assert_allclose(gating(router, hidden, ids).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_logits_are_exact(single_rank, bias):
    router, hidden, ids = random_router(add_bias_linear=bias)
    hidden, ids = hidden[:2, :, :].clone().requires_grad_(), torch.tensor([[0, 1], [2, -1]])
    parameters = list(
        dict.fromkeys([router.weight, *filter(None.__ne__, [router.bias]), *router.strategy.parameters()])
    )
    assert torch.autograd.gradcheck(lambda *_: gating(router, hidden, ids), (hidden, *parameters), atol=1e-8)


def test_a_gate_gets_a_gradient_from_its_own_modalitys_tokens_only(single_rank):
    router, hidden, ids = random_router()
    ids = ids.clamp(0, 1)  # no charts
    gating(router, hidden, ids)[one_hot(ids)[..., 1]].square().sum().backward()
    vision, chart = (router.strategy.gates[name].weight.grad for name in ("1", "2"))
    assert vision.abs().max() > 0
    for other in (router.weight.grad, chart):
        assert (other == 0).all(), "exactly zero, and not None: the gate is part of the graph of every micro-batch"


def test_a_mask_that_megatron_has_transposed_gives_the_same_routing(single_rank):
    router, hidden, ids = random_router()
    transposed = one_hot(ids).transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    for found, expected in zip(router(hidden, transposed), router(hidden, one_hot(ids)), strict=True):
        assert torch.equal(found, expected)


def test_a_layer_computes_the_logits_of_all_gates_in_one_matrix_product(single_rank, monkeypatch):
    from megatron.core.transformer.moe import router as megatron_router

    shapes = []
    product = megatron_router.router_gating_linear

    def counted(hidden, weight, *rest):
        shapes.append(tuple(weight.shape))
        return product(hidden, weight, *rest)

    router, hidden, ids = random_router()
    monkeypatch.setattr(megatron_router, "router_gating_linear", counted)
    router(hidden, one_hot(ids))
    assert shapes == [(3 * 4, 48)]


@pytest.mark.parametrize("router_dtype", [None, "fp32", "fp64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_precision_that_the_backbones_gate_has(single_rank, dtype, router_dtype):
    flags = {"moe_router_dtype": router_dtype, "params_dtype": dtype}
    router, plain = (
        router_of(ModalityGatesConfig(), IMAGES, **flags).to(dtype),
        router_of(None, IMAGES, **flags).to(dtype),
    )
    plain.load_state_dict(router.state_dict(), strict=False)
    hidden = torch.randn(6, 2, 48).to(dtype)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [-1, 1], [0, -1], [2, 0]])
    found, expected = gating(router, hidden, ids), gating(plain, hidden, ids)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5 if found.dtype != torch.bfloat16 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("parallel", [False, True])
def test_every_gate_is_to_megatron_what_the_backbones_is(single_rank, parallel):
    """By these Megatron decides about reductions over tensor-parallel ranks, weight decay, optimizer and data type."""
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    layout = sizes | {"sequence_parallel": True} if parallel else {}
    router = router_of(ModalityGatesConfig(), IMAGES, add_bias_linear=True, **layout)
    for gate in router.strategy.gates.values():
        for name in ("weight", "bias"):
            own, backbones = getattr(gate, name), getattr(router, name)
            assert vars(own) == vars(backbones) == {"sequence_parallel": parallel}
            assert (own.shape, own.dtype, own.requires_grad) == (backbones.shape, backbones.dtype, True)


def test_a_new_models_gates_are_equal_and_it_routes_as_without_the_strategy(single_rank):
    router = router_of(ModalityGatesConfig(), IMAGES, add_bias_linear=True)
    assert router.weight.abs().max() > 0
    for gate in router.strategy.gates.values():
        assert torch.equal(gate.weight, router.weight) and torch.equal(gate.bias, router.bias)
        assert gate.weight is not router.weight
    plain = router_of(None, IMAGES, add_bias_linear=True)
    plain.load_state_dict(router.state_dict(), strict=False)
    _, hidden, ids = random_router()
    for own, expected in zip(router(hidden, one_hot(ids)), plain(hidden, one_hot(ids)), strict=True):
        torch.testing.assert_close(own, expected)


def test_a_checkpoint_with_one_gate_starts_all_of_them_once_and_only_if_the_run_says_so(single_rank):
    router, _, _ = random_router(seed=1)
    source, _, _ = random_router(seed=2)
    names = ["gates.1.weight", "gates.2.weight"]
    one_gate = {name: value for name, value in source.state_dict().items() if "strategy" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*strategy.gates.1.weight"):
        router.load_state_dict(one_gate)
    assert {f"strategy.{name}" for name in names} < set(router.sharded_state_dict())
    router.start_without(names)
    assert not any("strategy" in name for name in router.sharded_state_dict())
    router.load_state_dict(one_gate)
    assert all(torch.equal(gate.weight, source.weight) for gate in router.strategy.gates.values())
    assert {f"strategy.{name}" for name in names} < set(router.sharded_state_dict()), "the next checkpoint has them"
    router.load_state_dict(source.state_dict())
    assert torch.equal(router.strategy.gates["2"].weight, source.strategy.gates["2"].weight)
