# SPDX-License-Identifier: Apache-2.0
"""Bins of experts and the information between modality and bin, against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.bins import (
    divergence_between_bins,
    expert_bins,
    inter_bin_mutual_information,
    intra_bin_balance,
    joint_distribution,
    mutual_information,
)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_bins_are_equal_in_size_and_ordered_by_the_share_of_text(bins, size, data):
    counts = st.lists(st.integers(0, 50), min_size=bins * size, max_size=bins * size)
    loads = torch.tensor([data.draw(counts), data.draw(counts)]).double()
    found = expert_bins(loads, bins)
    assert torch.bincount(found, minlength=bins).tolist() == [size] * bins
    share = [t / (t + v) if t + v else 0.5 for t, v in loads.t().tolist()]
    expected = sorted(range(bins * size), key=lambda expert: (share[expert], expert))
    assert [expert for each in range(bins) for expert in sorted(expected[each * size : (each + 1) * size])] == [
        expert for each in range(bins) for expert in (found == each).nonzero().flatten().tolist()
    ]


def test_experts_without_tokens_keep_their_order():
    assert expert_bins(torch.zeros(2, 6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert expert_bins(torch.tensor([[0.0, 4, 1, 0], [9, 0, 1, 0]]), 2).tolist() == [0, 1, 0, 1]


def test_a_number_of_bins_that_does_not_divide_the_experts_is_refused():
    with pytest.raises(ValueError, match="4 bins do not divide 6 experts"):
        expert_bins(torch.zeros(2, 6), 4)


def test_the_information_of_a_sample_is_that_of_its_own_tokens_without_padding():
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(9, 2, generator=generator, dtype=torch.float64).softmax(-1)
    gates = torch.rand(9, 6, generator=generator, dtype=torch.float64).softmax(-1)
    bins, samples = torch.tensor([2, 0, 1, 1, 0, 2]), torch.tensor([0, 2, 0, 2, -1, 0, 2, -1, 2])  # sample 1 is empty
    found = inter_bin_mutual_information(scores, gates, bins, samples)
    for sample in range(3):
        joint = np.zeros((2, 3))
        own = [token for token in range(9) if samples[token] == sample]
        for m, expert in np.ndindex(2, 6):
            mass = sum(float(scores[token, m]) for token in own)
            for token in own:
                joint[m, bins[expert]] += float(scores[token, m] * gates[token, expert]) / (2 * mass)
        joint /= joint.sum() or 1
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        expected = sum(p * np.log(p / q) for p, q in zip(joint.flat, independent.flat, strict=True) if p)
        assert float(found[sample]) == pytest.approx(expected, rel=1e-10, abs=1e-15)


def test_the_balance_inside_bins_is_that_of_the_papers_sum_and_the_inverse_number_of_bins_when_even():
    counts, probs = torch.tensor([3.0, 5, 0, 8, 2, 6]), torch.tensor([2.0, 1, 3, 2, 3, 1])
    bins, tokens, top_k = torch.tensor([0, 1, 0, 1, 0, 1]), 12, 2
    expected = sum(
        3 * (counts[e] / (top_k * tokens)) * (probs[e] / tokens) for k in (0, 1) for e in range(6) if bins[e] == k
    )
    assert float(intra_bin_balance(counts, probs, tokens, top_k, bins)) == pytest.approx(float(expected))
    even = torch.full((6,), 4.0), torch.full((6,), 2.0)
    assert float(intra_bin_balance(*even, tokens, top_k, bins)) == pytest.approx(1 / 2)


def test_bins_of_different_sizes_have_their_own_numbers_of_experts():
    """A bin's mass is a mean over its experts, so even gates say nothing about the bin, whatever its size."""
    bins, samples = torch.tensor([0, 0, 0, 1]), torch.zeros(2, dtype=torch.int64)
    even = torch.full((2, 4), 0.25, dtype=torch.float64)
    assert float(inter_bin_mutual_information(torch.eye(2).double(), even, bins, samples)) == pytest.approx(
        0, abs=1e-12
    )
    gates = torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    joint = np.array([[0.3, 0.1], [0.1, 0.7]]) / 1.2
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    expected = (joint * np.log(joint / independent)).sum()
    found = inter_bin_mutual_information(torch.eye(2).double(), gates, bins, samples)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    counts, probs = torch.tensor([1.0, 2, 3, 6]), torch.tensor([2.0, 1, 1, 2])
    assert float(intra_bin_balance(counts, probs, 6, 2, bins)) == pytest.approx((3 * (2 + 2 + 3) + 12) / (12 * 6))


def test_integer_counts_are_no_loads_or_bfloat16_gates_lose_the_information():
    assert expert_bins(torch.tensor([[1, 3, 0, 2], [3, 1, 0, 2]]), 2).tolist() == [0, 1, 0, 1]
    gates = torch.softmax(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)), -1)
    scores, bins, samples = torch.eye(2).repeat(32, 1), torch.tensor([0, 1, 0, 1]), torch.arange(64) % 2
    exact = inter_bin_mutual_information(scores, gates.bfloat16().float(), bins, samples // 2)
    torch.testing.assert_close(
        inter_bin_mutual_information(scores.bfloat16(), gates.bfloat16(), bins, samples // 2), exact
    )


def random_joint(samples: int = 5, modalities: int = 2, bins: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(samples, modalities, bins, generator=generator, dtype=torch.float64).softmax(-1) / modalities


def test_the_joint_distribution_gives_each_present_modality_the_same_mass():
    sums, masses = torch.rand(2, 2, 3).double(), torch.tensor([[4.0, 2.0], [3.0, 0.0]]).double()
    sums[1, 1] = 0
    sums *= (masses / sums.sum(-1).clamp(min=1e-9)).unsqueeze(-1)  # router probabilities over the bins add up to 1
    joint = joint_distribution(sums, masses)
    torch.testing.assert_close(joint.sum((1, 2)), torch.ones(2).double())
    torch.testing.assert_close(joint.sum(2), torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double())


def test_mutual_information_is_that_of_the_definition():
    joint = random_joint()
    for sample, found in zip(joint.numpy(), mutual_information(joint), strict=True):
        pairs = np.ndindex(*sample.shape)
        expected = sum(sample[m, k] * np.log(sample[m, k] / (sample[m].sum() * sample[:, k].sum())) for m, k in pairs)
        assert float(found) == pytest.approx(expected, rel=1e-12)
    apart = torch.tensor([[[0.5, 0.0], [0.0, 0.5]]])
    assert float(mutual_information(apart)) == pytest.approx(np.log(2))


def test_divergence_between_bins_is_the_symmetric_kl_of_the_conditional_distributions():
    joint, eps = random_joint(modalities=3), 1e-3
    for sample, found in zip(joint.numpy(), divergence_between_bins(joint, eps), strict=True):
        shares = (sample / sample.sum(1, keepdims=True) + eps) / (1 + 4 * eps)
        pairs = [(shares[i], shares[j]) for i in range(3) for j in range(i)]
        expected = np.mean([((p - q) * (np.log(p) - np.log(q))).sum() / 2 for p, q in pairs])
        assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("measure", [mutual_information, divergence_between_bins])
def test_a_sample_of_one_modality_or_none_gives_zero_and_no_nan_in_the_gradient(measure):
    sums = torch.rand(3, 2, 4, dtype=torch.float64)
    masses = torch.tensor([[3.0, 0.0], [0.0, 0.0], [2.0, 2.0]]).double()
    sums = (sums * (masses > 0).unsqueeze(-1)).requires_grad_()
    value = measure(joint_distribution(sums, masses))
    assert float(value[0].detach()) == pytest.approx(0, abs=1e-12) and value[1] == 0 and value[2] > 0
    value.sum().backward()
    assert sums.grad.isfinite().all()
    assert sums.grad[2].abs().max() > 0


@pytest.mark.parametrize("measure", [mutual_information, divergence_between_bins])
def test_gradients_are_those_of_the_value(measure):
    masses = torch.tensor([[3.0, 1.0], [2.0, 2.0]]).double()
    sums = torch.rand(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: measure(joint_distribution(x, masses)), sums)
