# SPDX-License-Identifier: Apache-2.0
"""The closed forms against the equations of `statistics` and `mrd`, which the tests of SMAR's mathematics check."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.routing.closed_form import distance_in_few_operations, packed_statistics, renormalized
from megatron_smar.routing.mrd import layer_distance
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics, statistics_from_mask
from megatron_smar.routing.strategies.smar import band_loss, smar_loss


def sums(seed, modalities, experts, absent=()):
    """Returns random sums, in which each modality uses about two thirds of the experts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 60, (modalities, experts), generator=generator, dtype=torch.float64)
    counts *= torch.rand(counts.shape, generator=generator) < 2 / 3
    weights = counts * torch.rand(counts.shape, generator=generator, dtype=torch.float64)
    tokens = counts.sum(1) + 1
    for modality in absent:
        counts[modality], weights[modality], tokens[modality] = 0, 0, 0
    return counts, weights, tokens


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 9),
    st.integers(1, 12),
    st.sampled_from([1e-6, 1e-3]),
    st.sets(st.integers(0, 8), max_size=9),
)
def test_distance_and_its_gradient_differ_from_the_equations(seed, modalities, experts, eps, absent):
    counts, weights, tokens = sums(seed, modalities, experts, [each for each in absent if each < modalities])
    results = []
    for function in (layer_distance, distance_in_few_operations):
        leaf = weights.clone().requires_grad_()
        distance, comparable = function(RoutingStatistics(counts, leaf, tokens), 2, eps)
        (gradient,) = torch.autograd.grad(distance * 3, leaf)
        results.append((distance.detach(), comparable, gradient))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_modality_whose_tokens_were_all_dropped_differs_from_the_equations():
    """It is present, and its row is uniform."""
    counts, weights, tokens = sums(1, 2, 6)
    counts[1], weights[1] = 0, 0
    results = []
    for function in (layer_distance, distance_in_few_operations):
        leaf = weights.clone().requires_grad_()
        distance, comparable = function(RoutingStatistics(counts, leaf, tokens), 2, 1e-3)
        (gradient,) = torch.autograd.grad(distance, leaf)
        assert comparable == 1 and torch.isfinite(gradient).all()
        results.append((distance.detach(), gradient))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("modalities", [2, 3])
def test_gradient_of_the_distance_differs_from_finite_differences(modalities):
    counts, weights, tokens = sums(2, modalities, 5)
    counts, weights = counts + 1, weights + 0.5

    def distance(leaf):
        return distance_in_few_operations(RoutingStatistics(counts, leaf, tokens), 2, 1e-3)[0]

    assert torch.autograd.gradcheck(distance, weights.requires_grad_(), atol=1e-9)


@pytest.mark.parametrize("band", [(0.0, 0.5), (1.0, 1.0), (0.9, 1.4), (3.0, 4.0)])
@pytest.mark.parametrize("comparable", [0.0, 1.0])
def test_band_loss_and_its_gradient_differ_from_the_equation(band, comparable):
    results = []
    for function in (
        lambda d: smar_loss(d, *band) * comparable,
        lambda d: band_loss(d, torch.tensor(comparable), *band),
    ):
        distance = torch.tensor(1.2 * comparable, dtype=torch.float64, requires_grad=True)
        value = function(distance)
        (gradient,) = torch.autograd.grad(value * 2, distance)
        results.append((value.detach().double(), gradient))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("uses_weights", [True, False])
def test_packed_sums_and_both_parts_of_the_weights_gradient_differ_from_plain_torch(uses_weights):
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(20, 6, generator=generator, dtype=torch.float64)
    chosen = torch.rand(20, 6, generator=generator) < 0.5
    ids = torch.arange(20) % 3 - 1  # -1 is padding
    mask = ids.unsqueeze(1) == torch.arange(2)
    of_sums, of_weights = (torch.randn(size, generator=generator).double() for size in ((2, 6), (20, 6)))
    results = []
    for packs in (False, True):
        leaf = probs.clone().requires_grad_()
        if packs:
            weights, statistics, packed = packed_statistics(leaf, chosen, mask.double(), mask.any(1, keepdim=True))
            assert torch.equal(packed, statistics.pack())
            statistics = PendingStatistics(statistics, None, packed=packed).wait()[0]
        else:
            weights, statistics = leaf, statistics_from_mask(leaf, chosen, mask)
        loss = (statistics.weights * of_sums).sum()
        if uses_weights:
            loss = loss + (weights * of_weights).sum()
        results.append((*(part.detach() for part in statistics), *torch.autograd.grad(loss, leaf)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_renormalized_weights_or_their_gradient_are_wrong():
    probs = torch.rand(7, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(renormalized(probs).sum(1), torch.ones(7, dtype=torch.float64))
    assert torch.autograd.gradcheck(renormalized, probs)
    dropped = torch.zeros(2, 5, requires_grad=True)  # tokens that lost all experts to a capacity limit
    (gradient,) = torch.autograd.grad((renormalized(dropped) * 1e6).sum(), dropped)
    assert not renormalized(dropped).any() and torch.isfinite(gradient).all()
