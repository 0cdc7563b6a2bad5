# SPDX-License-Identifier: Apache-2.0
"""SMAR's tolerance band (equation 13) and its application to one layer."""

from __future__ import annotations

from torch import Tensor

from megatron_smar.routing.mrd import modality_routing_distribution, mrd_distance
from megatron_smar.routing.statistics import RoutingStatistics


def smar_loss(distance: Tensor, d_min: float, d_max: float) -> Tensor:
    """How far a distance lies outside the band [d_min, d_max]; 0 inside, slope -1 below and +1 above (Eq. 13)."""
    return (distance - distance.clamp(d_min, d_max)).abs()


def layer_distance_and_loss(
    statistics: RoutingStatistics, top_k: int, eps: float, d_min: float, d_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's MRD distance, its SMAR loss, and whether they mean anything.

    Returns:
        (distance, loss, comparable), scalars. `comparable` is 1 where at least two modalities have tokens, else 0, and
        then distance and loss are 0 too: a batch of pure text is no violation of the band.
    """
    present = statistics.tokens > 0
    distance = mrd_distance(modality_routing_distribution(statistics, top_k, eps), present)
    comparable = (present.sum() >= 2).to(distance.dtype)
    return distance, smar_loss(distance, d_min, d_max) * comparable, comparable
