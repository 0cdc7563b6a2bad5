# SPDX-License-Identifier: Apache-2.0
"""Label cross-entropy, compared with its equation in NumPy, token by token."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.strategies.base import RoutedLayer, RoutedTokens
from megatron_smar.routing.strategies.label_ce import LABEL_LOSS, LabelCeConfig
from tests.models import router_of
from tests.unit.routing.reference import softmax
from tests.unit.routing.strategies.routed import IDS, batch, logits_of, run, set_weight

OWN = [[1, 3], [0, 2, 4, 5]]  # unequal and not contiguous
PARTS = ("text=1,3", "vision=0,2,4,5")
COEFF = 0.75  # exact in float32


def reference(router, inputs, ids):
    """Returns the loss and its gradient with respect to the router's weight, from the equation."""
    loss, gradient, tokens = 0.0, np.zeros(tuple(router.weight.shape)), (ids >= 0).sum()
    for modality, own in enumerate(OWN):
        for row, z in zip(*logits_of(router, inputs, ids, modality), strict=True):
            p = softmax(z)
            mass = sum(p[e] for e in own)
            loss -= np.log(mass) / tokens
            dz = p.copy()
            dz[own] -= p[own] / mass
            gradient += np.outer(dz, row) / tokens
    return loss, gradient


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_loss_or_gradient_differs_from_the_equation(single_rank, scores):
    config = LabelCeConfig(PARTS, coeff=COEFF)
    router = router_of(config, num_moe_experts=6, moe_router_score_function=scores)
    set_weight(router)
    inputs, mask = batch()
    losses, gradient = run(router, inputs, mask)
    loss, expected = reference(router, inputs, IDS)
    assert losses == {LABEL_LOSS: pytest.approx(loss, rel=1e-12)}
    np.testing.assert_allclose(gradient.numpy(), COEFF * expected, rtol=1e-10, atol=1e-14)


def test_the_loss_changes_who_is_chosen(single_rank):
    router, free = (router_of(config, num_moe_experts=6) for config in (LabelCeConfig(PARTS, coeff=COEFF), None))
    for each in (router, free):
        set_weight(each)
    inputs, mask = batch()
    for found, expected in zip(router(inputs, mask), free(inputs, mask), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ids", [np.full((3, 2), -1), np.zeros((3, 2), int), np.ones((3, 2), int)])
def test_a_batch_of_padding_or_of_one_modality_gives_nan(single_rank, ids):
    router = router_of(LabelCeConfig(PARTS, coeff=COEFF), num_moe_experts=6)
    set_weight(router)
    inputs, mask = batch(ids)
    losses, gradient = run(router, inputs, mask)
    loss, expected = reference(router, inputs, ids) if (ids >= 0).any() else (0.0, np.zeros(router.weight.shape))
    assert losses[LABEL_LOSS] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), COEFF * expected, rtol=1e-10, atol=1e-14)


def layer_sum(config: LabelCeConfig, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    strategy = config.build(RoutedLayer(logits.shape[1], 2, 48, ("text", "vision")))
    return strategy.sums(RoutedTokens(logits, logits, logits, logits > 0, mask))["label"]


def test_the_gradient_is_not_that_of_the_value():
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1], [1, 0]], dtype=torch.bool)
    torch.autograd.gradcheck(lambda z: layer_sum(LabelCeConfig(PARTS), z, mask), logits)


@given(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), st.integers(0, 1), st.floats(-1e4, 1e4))
def test_large_logits_overflow_or_a_common_shift_changes_the_loss(values, modality, shift):
    logits = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    mask = torch.arange(2).eq(modality).unsqueeze(0)
    loss = layer_sum(LabelCeConfig(), logits, mask)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and logits.grad.isfinite().all()
    torch.testing.assert_close(layer_sum(LabelCeConfig(), logits + shift, mask), loss, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (("text=0-3",), "--label-ce-experts text=0-3 must name each of text, vision once"),
        (("text=1.0", "vision=0.0"), "text=1.0 vision=0.0 leaves vision none of the 4 experts"),
    ],
)
def test_experts_that_give_no_finite_loss_are_refused_with_their_flag(experts, said):
    args = SimpleNamespace(image_modalities=["vision"], num_experts=4)
    with pytest.raises(ValueError, match=said):
        LabelCeConfig(experts).check(args, [1, 2])
    LabelCeConfig().check(args, [1, 2])
    with pytest.raises(ValueError, match=r"--label-ce-coeff is -1.0; it must be 0 or more"):
        LabelCeConfig(coeff=-1.0)
