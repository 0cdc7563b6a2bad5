# SPDX-License-Identifier: Apache-2.0
"""The modality routing distribution and the distance between modalities (SMAR, equations 6 to 12)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from megatron_smar.routing.statistics import RoutingStatistics


def modality_routing_distribution(statistics: RoutingStatistics, top_k: int, eps: float = 1e-6) -> Tensor:
    """Returns the MRD of each modality, [M, E]; each row sums to 1.

    F = counts / (K tokens) (Eq. 6), R = weights / tokens (Eq. 7), Q = F R normalized over the experts (Eq. 8, 9). Q is
    then smoothed, because F is exactly 0 for an expert that a modality never chose and the KL divergence would be
    infinite: Q~ = (Q / sum Q + eps) / (1 + E eps). F is a count and has no gradient; the gradient flows through R.

    The row of a modality without tokens is uniform (and `mrd_distance` leaves it out).

    Args:
        statistics: Sums over tokens; counts and weights [M, E], tokens [M].
        top_k: K, experts per token.
        eps: Smoothing term. The distance depends on it where a modality does not use an expert.
    """
    counts, weights, tokens = statistics
    tokens = tokens.clamp(min=1).unsqueeze(1)
    frequency = (counts / (top_k * tokens)).detach()
    expected_weight = weights / tokens
    mass = frequency * expected_weight
    total = mass.sum(dim=1, keepdim=True)
    num_experts = mass.shape[1]
    empty = total <= 0
    normalized = torch.where(empty, 1.0 / num_experts, mass / total.clamp(min=torch.finfo(mass.dtype).tiny))
    return (normalized + eps) / (1.0 + num_experts * eps)


def mrd_distance(mrd: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns the symmetric Kullback-Leibler distance between modalities, a scalar in nats (Eq. 10 to 12).

    (KL(p||q) + KL(q||p)) / 2 = sum_e (p_e - q_e) (log p_e - log q_e) / 2. For more than two modalities this is the mean
    over the unordered pairs of modalities that are present; 0 if fewer than two are present.

    Args:
        mrd: Routing distributions [M, E], strictly positive.
        present: [M] bool, the modalities that have tokens; None means all.
    """
    pairs = list(combinations(range(mrd.shape[0]), 2))
    if not pairs:
        return mrd.new_zeros(())
    # Few operations: on a GPU each is one kernel per MoE layer. Row by row, because an index would need a host copy.
    first, second = (torch.stack([mrd[pair[side]] for pair in pairs]) for side in (0, 1))
    pairwise = 0.5 * ((first - second) * (first.log() - second.log())).sum(dim=-1)
    if present is None:
        return pairwise.mean()
    comparable = torch.stack([present[i] & present[j] for i, j in pairs])
    return (pairwise * comparable).sum() / comparable.sum().clamp(min=1)


def layer_distance(statistics: RoutingStatistics, top_k: int, eps: float) -> tuple[Tensor, Tensor]:
    """Returns one layer's MRD distance, and whether it is defined.

    Args:
        statistics: Sums over the layer's tokens; counts and weights [M, E], tokens [M].
        top_k: K, experts per token.
        eps: Smoothing term of the distributions.

    Returns:
        (distance, comparable), scalars. `comparable` is 1 where at least two modalities have tokens. Otherwise both are
        0.
    """
    present = statistics.tokens > 0
    distance = mrd_distance(modality_routing_distribution(statistics, top_k, eps), present)
    return distance, (present.sum() >= 2).to(distance.dtype)
