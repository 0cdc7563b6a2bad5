# SPDX-License-Identifier: Apache-2.0
"""The balance loss per modality, compared with its equation in NumPy and with Megatron's aux_loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.strategies.balance import BALANCE_LOSS, balance_losses, balance_sums, coefficients
from megatron_smar.routing.strategies.base import RoutedTokens
from megatron_smar.routing.strategies.modality_balance import ModalityBalanceConfig
from tests.models import router_of
from tests.unit.routing.reference import softmax
from tests.unit.routing.strategies.routed import IDS, batch, logits_of, run, set_weight

COEFFS = {0: 0.3, 1: 0.05}
CONFIG = ModalityBalanceConfig(("text=0.3", "vision=0.05"))
K, E = 2, 6


def scores_of(z: np.ndarray, function: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a token's scores [E], which add up to 1, and their derivatives dP_e/dz_j [E, E]."""
    if function == "softmax":
        p = softmax(z)
        return p, np.diag(p) - np.outer(p, p)
    s = 1 / (1 + np.exp(-z))
    ds, total = s * (1 - s), s.sum()
    return s / total, np.diag(ds / total) - np.outer(s, ds) / total**2


def reference(router, inputs, ids, coeffs, function="softmax", experts=None):
    """Returns the loss and its gradient with respect to the router's weight, from the equation.

    `experts` are those of each modality; by default all of them.
    """
    loss, gradient = 0.0, np.zeros(tuple(router.weight.shape))
    for modality, coeff in coeffs.items():
        own = list(range(len(gradient))) if experts is None else experts[modality]
        rows, logits = logits_of(router, inputs, ids, modality)
        if not len(rows):
            continue
        f, p, derivatives = np.zeros(len(own)), np.zeros(len(own)), []
        for z in logits[:, own]:
            score, derivative = scores_of(z, function)
            derivatives.append(derivative)
            p += score / len(rows)
            f[np.argsort(-score)[:K]] += 1 / (K * len(rows))
        loss += coeff * len(own) * (f * p).sum()
        for row, derivative in zip(rows, derivatives, strict=True):
            gradient[own] += coeff * len(own) * np.outer(f @ derivative, row) / len(rows)
    return loss, gradient


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("coeffs", [{0: 0.3, 1: 0.05}, {0: 0.3, 1: 0.0}])
def test_loss_or_gradient_differs_from_the_equation(single_rank, function, coeffs):
    config = ModalityBalanceConfig((f"text={coeffs[0]}", f"vision={coeffs[1]}"))
    router = router_of(config, num_moe_experts=E, moe_router_score_function=function)
    set_weight(router)
    inputs, mask = batch()
    losses, gradient = run(router, inputs, mask)
    loss, expected = reference(router, inputs, IDS, coeffs, function)
    assert losses == {BALANCE_LOSS: pytest.approx(loss, rel=1e-12)}
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_with_text_only_it_is_not_megatrons_aux_loss(single_rank, function):
    ids = np.where(IDS < 0, -1, 0)
    inputs, mask = batch(ids)
    ours = router_of(CONFIG, num_moe_experts=E, moe_router_score_function=function)
    megatrons = router_of(
        None,
        num_moe_experts=E,
        moe_router_score_function=function,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=COEFFS[0],
    )
    for each in (ours, megatrons):
        set_weight(each)
    gradients = [run(router, inputs, mask)[1] for router in (ours, megatrons)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)  # Megatron's scores are float32
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("ids", [np.full((3, 2), -1), np.zeros((3, 2), int), np.ones((3, 2), int)])
def test_a_modality_without_tokens_adds_something_or_nan(single_rank, ids):
    router = router_of(CONFIG, num_moe_experts=E)
    set_weight(router)
    inputs, mask = batch(ids)
    losses, gradient = run(router, inputs, mask)
    loss, expected = reference(router, inputs, ids, COEFFS)
    assert losses[BALANCE_LOSS] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_dropped_tokens_or_the_expert_bias_change_the_loss(single_rank):
    inputs, mask = batch()
    plain = router_of(CONFIG, num_moe_experts=E, moe_router_score_function="sigmoid")
    limited = router_of(CONFIG, num_moe_experts=E, moe_router_score_function="sigmoid", moe_expert_capacity_factor=0.5)
    biased = router_of(
        CONFIG, num_moe_experts=E, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    )
    biased.expert_bias = torch.linspace(-2, 2, E)
    for router in (plain, limited, biased):
        set_weight(router)
    maps = [router(inputs, mask)[1] for router in (plain, limited, biased)]
    assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    losses = [run(router, inputs, mask)[0][BALANCE_LOSS] for router in (plain, limited, biased)]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-12)] * 2


def layer_losses(logits: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    sums = balance_sums(RoutedTokens(logits, logits, logits, logits > 0, mask), k, "softmax")
    return balance_losses(sums, mask.sum(0).to(logits.dtype), k, logits.shape[1])


def test_the_gradient_is_not_that_of_the_value():
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 0]], dtype=torch.bool)
    torch.autograd.gradcheck(lambda z: layer_losses(z, mask, 2), logits)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**31))
def test_an_even_load_has_another_loss_than_one(k, more, seed):
    experts = k + more
    turns = torch.arange(experts).unsqueeze(0) + torch.arange(experts).unsqueeze(1)
    row = torch.rand(experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
    logits = row[turns % experts]  # each expert is first for one token, second for another, and so on
    mask = torch.ones(experts, 1, dtype=torch.bool)
    torch.testing.assert_close(layer_losses(logits, mask, k), torch.ones(1, dtype=torch.float64))


def test_coefficients_are_read_in_another_order_or_the_rest_is_balanced():
    names = ("text", "vision", "chart")
    assert coefficients("--x", ("chart=0.2", "text=1e-3"), names) == [1e-3, 0.0, 0.2]
    assert coefficients("--x", ("0.5",), names) == [0.5] * 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("text=a",), "--modality-balance-coeff text=a has a part without a number"),
        (("text",), "text has a part without a number"),
        (("text=-1",), "text=-1 is not a coefficient of 0 or more"),
        (("text=nan",), "text=nan is not a coefficient of 0 or more"),
        (("text=1", "text=2"), "must name each of text, vision at most once"),
        (("text=1", "video=2"), "must name each of text, vision at most once"),
        (("0.1", "text=2"), "must name each of text, vision at most once"),
        (("0.1", "0.2"), "must name each of text, vision at most once"),
    ],
)
def test_coefficients_that_say_nothing_are_accepted(given, said):
    args = SimpleNamespace(image_modalities=["vision"], moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0)
    with pytest.raises(ValueError, match=said):
        ModalityBalanceConfig(given).check(args, None)


@pytest.mark.parametrize(
    ("kinds", "coeffs", "is_refused"),
    [("aux_loss", 0.0, False), ("aux_loss", 0.1, True), (["seq_aux_loss", "global_aux_loss"], [0.0, 0.2], True)],
)
def test_tokens_are_balanced_twice(kinds, coeffs, is_refused):
    args = SimpleNamespace(image_modalities=["vision"], moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coeffs)
    if is_refused:
        with pytest.raises(ValueError, match=r"--moe-aux-loss-coeff 0\.\d would balance the same tokens as --modality"):
            CONFIG.check(args, None)
    else:
        CONFIG.check(args, None)
