# SPDX-License-Identifier: Apache-2.0
"""Bins of experts and the information between modality and bin, against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.bins import bin_experts, divergence_between_bins, joint_distribution, mutual_information


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_bins_are_equal_in_size_and_ordered_by_the_share_of_text(bins, size, data):
    counts = st.lists(st.integers(0, 50), min_size=bins * size, max_size=bins * size)
    loads = torch.tensor([data.draw(counts), data.draw(counts)]).double()
    found = bin_experts(loads, bins)
    assert torch.bincount(found, minlength=bins).tolist() == [size] * bins
    share = [t / (t + v) if t + v else 0.5 for t, v in loads.t().tolist()]
    expected = sorted(range(bins * size), key=lambda expert: (share[expert], expert))
    assert [expert for each in range(bins) for expert in sorted(expected[each * size : (each + 1) * size])] == [
        expert for each in range(bins) for expert in (found == each).nonzero().flatten().tolist()
    ]


def test_experts_without_tokens_keep_their_order():
    assert bin_experts(torch.zeros(2, 6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert bin_experts(torch.tensor([[0.0, 4, 1, 0], [9, 0, 1, 0]]), 2).tolist() == [0, 1, 0, 1]


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
