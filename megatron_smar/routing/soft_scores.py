# SPDX-License-Identifier: Apache-2.0
"""Soft modality scores: how much a token belongs to each modality (SMoES, arXiv 2604.23996, section 3).

A score M_{j,m} in [0, 1] replaces the hard label of token j; the scores of a token sum to 1. Scores are labels: they
carry no gradient. Padding has none (zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-6
TEMPERATURE_PER_DIMENSION = 0.5  # the paper's tau = 0.5 D


def blend_attention_scores(scores: Tensor, attended: Tensor, attention_norm: Tensor, residual_norm: Tensor) -> Tensor:
    """Returns the scores of the next layer, [..., M].

        M^{l+1} = (|x_attn| M~ + |x| M^l) / (|x_attn| + |x|),   M~ = Attn M^l

    Args:
        scores: M^l, [..., M].
        attended: M~, [..., M].
        attention_norm: |x_attn|, the norm of the attention block's output, [...].
        residual_norm: |x|, the norm of the residual stream that enters the attention block, [...].
    """
    other, own = attention_norm.unsqueeze(-1), residual_norm.unsqueeze(-1)
    return (other * attended + own * scores) / (other + own).clamp(min=torch.finfo(scores.dtype).tiny)


def scores_after_attention(scores: Tensor, attended: Tensor, entering: Tensor, output: Tensor) -> Tensor:
    """Returns the scores of the next layer (`blend_attention_scores`), from those of this layer and its attention.

    Args:
        scores: M^l, [s, b, M]; all 0 for padding.
        attended: M~, the attention's mean over heads applied to M^l, [s, b, M]. Its rows are normalized to sum to 1,
            which a kernel in half precision only approximates.
        entering: x, the residual stream that enters the attention block, [s, b, h].
        output: x_attn, the attention block's output, [s, b, h].

    Returns:
        M^{l+1}, [s, b, M], in the precision of `scores`.
    """
    tiny = torch.finfo(scores.dtype).tiny
    attended = attended.to(scores.dtype)
    attended = attended / attended.sum(dim=-1, keepdim=True).clamp(min=tiny)
    other, own = (torch.linalg.vector_norm(x, dim=-1, dtype=scores.dtype) for x in (output, entering))
    return blend_attention_scores(scores, attended, other, own) * (scores.sum(dim=-1, keepdim=True) > 0)


def gaussian_modality_scores(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns scores from a diagonal Gaussian per modality, [N, M].

        LL_m = -1/2 sum_d (log sigma2_{m,d} + (x_d - mu_{m,d})^2 / sigma2_{m,d}),   M_m = softmax_m(LL_m / (0.5 D))

    The squares are expanded into matrix products, since a tensor [N, M, D] would not fit.

    Args:
        x: The layer's input, [N, D].
        mean: mu, [M, D].
        variance: sigma2, [M, D], greater than 0.
    """
    x, precision = x.to(mean.dtype), variance.reciprocal()
    center = mean.mean(dim=0)  # without the common part the squares cancel less
    x, mean = x - center, mean - center
    constant = variance.log().sum(dim=1) + (mean.square() * precision).sum(dim=1)
    squares = x.square() @ precision.t() - 2 * x @ (mean * precision).t()
    return torch.softmax(-0.5 * (constant + squares) / (TEMPERATURE_PER_DIMENSION * x.shape[1]), dim=-1)


def updated_gaussians(
    mean: Tensor, variance: Tensor, known: Tensor, sums: Tensor, squares: Tensor, tokens: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means, variances and `known` after a step, by the moving-average form of Welford's algorithm.

    With the step's mean m and variance v: sigma2 <- decay (sigma2 + (1 - decay) (m - mu)^2) + (1 - decay) v and mu <-
    decay mu + (1 - decay) m. A modality's first step sets mu = m and sigma2 = v; a step without its tokens changes
    nothing.

    Args:
        mean: [M, D].
        variance: [M, D].
        known: Whether a modality has had tokens, [M] bool.
        sums: Sum of x over the step's tokens of each modality, [M, D].
        squares: Sum of x^2, [M, D].
        tokens: Number of tokens, [M].
        decay: Share of the old value that is kept.
    """
    number = tokens.clamp(min=1).unsqueeze(1)
    new_mean = sums / number
    new_variance = squares / number - new_mean.square()
    step = 1 - decay
    moved = decay * (variance + step * (new_mean - mean).square()) + step * new_variance
    has_tokens, was_known = (tokens > 0).unsqueeze(1), known.unsqueeze(1)
    variance = torch.where(has_tokens, torch.where(was_known, moved, new_variance), variance).clamp(min=VARIANCE_FLOOR)
    mean = torch.where(has_tokens, torch.where(was_known, decay * mean + step * new_mean, new_mean), mean)
    return mean, variance, known | (tokens > 0)
