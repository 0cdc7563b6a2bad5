# SPDX-License-Identifier: Apache-2.0
"""Equations 6 to 13 compared with the independent NumPy evaluation, and their gradient with finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.routing import (
    RoutingStatistics,
    modality_routing_distribution,
    mrd_distance,
    routing_statistics,
)
from megatron_smar.routing.strategies.smar import smar_loss
from tests.models import smar_of_layer
from tests.unit.routing import reference


@st.composite
def routings(draw, modalities=None):
    """Random top-k routings of tokens of M modalities, with padding and possibly absent modalities."""
    experts = draw(st.integers(1, 9))
    k = draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    tokens = draw(st.integers(1, 40))
    m = modalities or draw(st.sampled_from([2, 2, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = draw(st.sampled_from([list(range(-1, m)), [0, -1], [m - 1], [0, m - 1], [-1]]))
    ids = rng.choice(pool, size=tokens)
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    probabilities = np.stack([reference.softmax(row) for row in rng.normal(size=(tokens, experts)) * scale])
    weights = np.stack([reference.topk_weights(row, k) for row in probabilities])
    return weights, weights > 0, ids, m, k


def as_torch(weights, chosen, ids):
    return torch.tensor(weights), torch.tensor(chosen), torch.tensor(ids)


@settings(max_examples=200, deadline=None)
@given(routings(), st.sampled_from([1e-6, 1e-3]))
def test_distance_and_loss_equal_the_papers_equations(routing, eps):
    weights, chosen, ids, m, k = routing
    statistics = routing_statistics(*as_torch(weights, chosen, ids), m)
    d, loss, comparable = smar_of_layer(statistics, k, eps, 1.5, 2.0)
    expected_d, expected_loss = reference.layer(weights, chosen, ids, m, k, eps, 1.5, 2.0)
    np.testing.assert_allclose([d.item(), loss.item()], [expected_d, expected_loss], rtol=1e-10, atol=1e-12)
    assert bool(comparable) == (len({i for i in ids if i >= 0}) >= 2)


@settings(max_examples=100, deadline=None)
@given(routings())
def test_distributions_equal_the_papers_and_sum_to_one(routing):
    weights, chosen, ids, m, k = routing
    mrd = modality_routing_distribution(routing_statistics(*as_torch(weights, chosen, ids), m), k)
    torch.testing.assert_close(mrd.sum(dim=1), torch.ones(m, dtype=torch.float64))
    for modality in range(m):
        if (ids == modality).any():
            of = ids == modality
            expected = reference.distribution(weights[of], chosen[of], k, 1e-6)
            np.testing.assert_allclose(mrd[modality].numpy(), expected, rtol=1e-10)


@settings(max_examples=100, deadline=None)
@given(routings(), st.integers(0, 2**32 - 1))
def test_statistics_of_shards_add_up_to_those_of_all_tokens(routing, seed):
    weights, chosen, ids = as_torch(*routing[:3])
    m = routing[3]
    boundary = int(np.random.default_rng(seed).integers(0, len(ids) + 1))
    combined = routing_statistics(weights, chosen, ids, m)
    parts = [routing_statistics(weights[s], chosen[s], ids[s], m) for s in (slice(0, boundary), slice(boundary, None))]
    for total, a, b in zip(combined, *parts, strict=True):
        torch.testing.assert_close(total, a + b)


@settings(max_examples=50, deadline=None)
@given(routings())
def test_padding_is_not_counted(routing):
    weights, chosen, ids = as_torch(*routing[:3])
    m = routing[3]
    kept = ids >= 0
    with_padding = routing_statistics(weights, chosen, ids, m)
    without = routing_statistics(weights[kept], chosen[kept], ids[kept], m)
    for a, b in zip(with_padding, without, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("m", "k"), [(2, 1), (2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("band", [(4.0, 5.0), (0.0, 0.01)], ids=["below", "above"])
def test_gradient_with_respect_to_logits_and_biases_is_exact(m, k, band):
    """Top-k and F are constants, as in Eq. 6: F is a count, and only R carries the gradient."""
    generator = torch.Generator().manual_seed(7)
    experts, tokens = 4, 18
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(m, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(tokens) % (m + 1) - 1

    def loss(logits, bias):
        one_hot = (ids.unsqueeze(1) == torch.arange(m)).to(logits.dtype)
        probabilities = (logits + one_hot @ bias).softmax(dim=-1)
        values, indices = probabilities.topk(k, dim=-1)
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, indices, True)
        weights = torch.zeros_like(probabilities).scatter(1, indices, values / values.sum(-1, keepdim=True))
        return smar_of_layer(routing_statistics(weights, chosen, ids, m), k, 1e-3, *band)[1]

    assert loss(logits, bias) > 0, "inside the band the gradient is zero and proves nothing"
    assert torch.autograd.gradcheck(loss, (logits, bias), atol=1e-8)
    if k == 1:  # the weight of a single expert is always 1: SMAR has a distance, but no gradient
        return
    (gradient,) = torch.autograd.grad(loss(logits, bias), bias)
    assert gradient.abs().max() > 1e-6


def test_frequency_carries_no_gradient():
    counts = torch.tensor([[3.0, 1.0], [1.0, 3.0]], requires_grad=True)
    weights = torch.tensor([[2.5, 1.5], [1.0, 3.0]], requires_grad=True)
    statistics = RoutingStatistics(counts, weights, torch.tensor([4.0, 4.0]))
    mrd_distance(modality_routing_distribution(statistics, 1)).backward()
    assert counts.grad is None
    assert weights.grad.abs().max() > 0


@pytest.mark.parametrize("ids", [[0, 0, 0], [1, 1, -1], [-1, -1, -1]], ids=["text only", "vision only", "only padding"])
def test_a_batch_with_one_modality_gives_no_loss_and_no_nan(ids):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = logits.softmax(-1)
    statistics = routing_statistics(weights, torch.ones(3, 4, dtype=torch.bool), torch.tensor(ids), 2)
    distance, loss, comparable = smar_of_layer(statistics, 4, 1e-6, 1.5, 2.0)
    loss.backward()
    assert (distance.item(), loss.item(), comparable.item()) == (0.0, 0.0, 0.0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_identical_routing_is_at_distance_zero_and_disjoint_routing_is_far():
    same = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    apart = modality_routing_distribution(RoutingStatistics(torch.eye(2), torch.eye(2), torch.ones(2)), 1)
    assert mrd_distance(same) == 0
    assert mrd_distance(apart) > 10


def test_band_is_zero_inside_and_linear_outside():
    distances = torch.tensor([1.0, 1.5, 1.7, 2.0, 2.25], requires_grad=True)
    losses = smar_loss(distances, 1.5, 2.0)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.5, 0.0, 0.0, 0.0, 0.25]))
    assert distances.grad.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]


def test_half_precision_weights_are_summed_in_float32():
    weights = torch.full((4096, 2), 0.5, dtype=torch.bfloat16)
    statistics = routing_statistics(
        weights, torch.ones(4096, 2, dtype=torch.bool), torch.zeros(4096, dtype=torch.int8), 2
    )
    assert statistics.weights.dtype == torch.float32
    assert statistics.weights[0, 0] == 2048.0
