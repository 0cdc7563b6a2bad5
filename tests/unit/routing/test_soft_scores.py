# SPDX-License-Identifier: Apache-2.0
"""Soft modality scores against the paper's equations, written in NumPy."""

import numpy as np
import torch

from megatron_smar.routing.soft_scores import (
    blend_attention_scores,
    gaussian_modality_scores,
    scores_after_attention,
    updated_gaussians,
)

GENERATOR = torch.Generator().manual_seed(5)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_scores_after_attention_are_the_mean_weighted_by_both_norms():
    scores, attended = torch.softmax(normal(6, 2, 3), -1), torch.softmax(normal(6, 2, 3), -1)
    entering, output = normal(6, 2, 8), 2 * normal(6, 2, 8)
    found = scores_after_attention(scores, attended, entering, output)
    blended = blend_attention_scores(scores, attended, output.norm(dim=-1), entering.norm(dim=-1))
    torch.testing.assert_close(blended, found, rtol=1e-12, atol=0)
    for s, b in np.ndindex(6, 2):
        own, other = np.linalg.norm(entering[s, b]), np.linalg.norm(output[s, b])
        expected = (other * attended[s, b] + own * scores[s, b]) / (other + own)
        np.testing.assert_allclose(found[s, b], expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)


def test_padding_gets_no_score_from_what_it_attends_to_and_zero_norms_give_no_nan():
    scores = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    attended = torch.full((3, 1, 2), 0.5)
    norms = torch.ones(3, 1, 4)
    norms[2] = 0
    found = scores_after_attention(scores, attended, norms, norms)
    assert found[1].tolist() == [[0, 0]]
    torch.testing.assert_close(found[0], torch.tensor([[0.75, 0.25]]))
    assert not found.isnan().any()


def test_scores_keep_their_precision_beside_bf16_activations_and_their_sum():
    scores = torch.softmax(torch.randn(64, 1, 2, generator=GENERATOR), -1)
    attended = torch.softmax(torch.randn(64, 1, 2, generator=GENERATOR), -1)
    x = torch.randn(64, 1, 16, generator=GENERATOR).bfloat16()
    found = scores_after_attention(scores, attended.bfloat16(), x, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(64, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, (scores + attended) / 2, atol=4e-3, rtol=0)


def likelihoods(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The paper's LL_m, term by term, [N, M]."""
    terms = [np.log(v) + (x - m) ** 2 / v for m, v in zip(mean, variance, strict=True)]
    return np.stack([-0.5 * term.sum(1) for term in terms], 1)


def test_gaussian_scores_are_the_softmax_of_the_log_likelihoods_over_half_the_dimension():
    hidden, mean, variance = normal(7, 12), normal(3, 12) + 4, normal(3, 12).exp()
    found = gaussian_modality_scores(hidden, mean, variance)
    exponents = np.exp(likelihoods(hidden.numpy(), mean.numpy(), variance.numpy()) / (0.5 * 12))
    np.testing.assert_allclose(found, exponents / exponents.sum(1, keepdims=True), rtol=1e-9)


def test_means_far_from_zero_cost_gaussian_scores_no_precision_in_float32():
    hidden, mean, variance = normal(50, 256) + 100, normal(2, 256) + 100, normal(2, 256).exp()
    exact = gaussian_modality_scores(hidden, mean, variance)
    found = gaussian_modality_scores(hidden.float(), mean.float(), variance.float())
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_gaussians_follow_the_moving_average_of_welford_step_by_step():
    decay = 0.9
    mean, variance, known = torch.zeros(2, 5).double(), torch.ones(2, 5).double(), torch.zeros(2, dtype=torch.bool)
    expected: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for numbers in ((4, 0), (3, 6), (0, 2), (5, 5)):
        parts = [normal(number, 5) for number in numbers]
        for modality, part in enumerate(parts):
            if not len(part):
                continue
            m, v = part.numpy().mean(0), part.numpy().var(0)
            if modality in expected:
                old_m, old_v = expected[modality]
                v = decay * (old_v + (1 - decay) * (m - old_m) ** 2) + (1 - decay) * v
                m = decay * old_m + (1 - decay) * m
            expected[modality] = m, v
        sums = torch.stack([part.sum(0) for part in parts])
        squares = torch.stack([part.square().sum(0) for part in parts])
        tokens = torch.tensor(numbers).double()
        mean, variance, known = updated_gaussians(mean, variance, known, sums, squares, tokens, decay)
        assert known.tolist() == [modality in expected for modality in range(2)]
        for modality, (m, v) in expected.items():
            np.testing.assert_allclose(mean[modality], m, rtol=1e-10)
            np.testing.assert_allclose(variance[modality], np.maximum(v, 1e-6), rtol=1e-8)


def test_a_dimension_without_spread_has_the_floor_as_variance():
    known = torch.zeros(1, dtype=torch.bool)
    zero = torch.zeros(1, 3)
    sums, squares, tokens = torch.full((1, 3), 8.0), torch.full((1, 3), 16.0), torch.tensor([4.0])
    _, variance, _ = updated_gaussians(zero, zero + 1, known, sums, squares, tokens, 0.99)
    torch.testing.assert_close(variance, torch.full((1, 3), 1e-6))
