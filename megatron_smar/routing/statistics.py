# SPDX-License-Identifier: Apache-2.0
"""Routing statistics of one MoE layer, and the one asynchronous reduction that makes them global.

SMAR, section 3.1, equations 6 and 7, before the divisions: sums are what can be added up over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_smar.routing.modalities import modality_mask_from_ids


class RoutingStatistics(NamedTuple):
    """Sums over tokens, per modality m and expert e.

    Attributes:
        counts: [M, E], tokens of modality m that chose expert e; no gradient flows through it.
        weights: [M, E], sum of the renormalised top-k weights (Eq. 5); carries the gradient.
        tokens: [M], tokens of modality m.
    """

    counts: Tensor
    weights: Tensor
    tokens: Tensor


def routing_statistics(
    weights: Tensor, routing_map: Tensor, modality_ids: Tensor, num_modalities: int
) -> RoutingStatistics:
    """Sums of equations 6 and 7 over the given tokens.

    Args:
        weights: [N, E], top-k weights renormalised over the chosen experts (Eq. 5), 0 where not chosen.
        routing_map: [N, E] bool, the chosen experts.
        modality_ids: [N] int, 0 .. M-1, or -1 for padding, which counts nowhere.
        num_modalities: M.

    Returns:
        The sums, in float32 (float64 if the weights are).
    """
    mask = modality_mask_from_ids(modality_ids, num_modalities)
    return statistics_from_mask(weights, routing_map, mask)


def statistics_from_mask(weights: Tensor, routing_map: Tensor, modality_mask: Tensor) -> RoutingStatistics:
    """As `routing_statistics`, with one-hot modalities [N, M] bool: three sums, no indexing, no synchronisation."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    one_hot = modality_mask.to(dtype).t()
    counts = one_hot @ routing_map.to(dtype)
    return RoutingStatistics(counts, one_hot @ weights.to(dtype), one_hot.sum(dim=1))


class PendingStatistics:
    """A reduction under way: launched when routing is known, waited for after the experts have run.

    One all-reduce of M * (2E + 1) floats and the strategy's own sums. The counts and tokens are constants; the other
    sums are differentiable without any communication in the backward pass: every rank computes the same loss from the
    same global sums, so the derivative of the loss by the global sum *is* its derivative by this rank's share,
    W = sum_r W_r.

    Args:
        local: This rank's sums.
        group: The ranks; None for this one alone.
        sums: The strategy's own sums of this rank, by name, of any shape.
    """

    def __init__(
        self, local: RoutingStatistics, group: dist.ProcessGroup | None, sums: Mapping[str, Tensor] | None = None
    ) -> None:
        self._local = local
        self._sums = dict(sums or {})
        parts = [local.counts, local.weights, local.tokens, *self._sums.values()]
        self._packed = torch.cat([part.detach().flatten().to(local.weights.dtype) for part in parts])
        reduces = group is not None and dist.get_world_size(group) > 1
        self._work = dist.all_reduce(self._packed, group=group, async_op=True) if reduces else None

    def wait(self) -> tuple[RoutingStatistics, dict[str, Tensor]]:
        """The global sums, those of the statistics and the strategy's; gradients reach this rank's own tokens."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        local = [*self._local, *self._sums.values()]
        totals = self._packed.split([part.numel() for part in local])
        counts, weights, tokens, *sums = (total.view_as(part) for total, part in zip(totals, local, strict=True))
        own = {name: _with_gradient(total, self._sums[name]) for name, total in zip(self._sums, sums, strict=True)}
        return RoutingStatistics(counts, _with_gradient(weights, self._local.weights), tokens), own


def _with_gradient(total: Tensor, local: Tensor) -> Tensor:
    """The total, with the gradient of this rank's share: what is added is exactly zero."""
    return total + (local - local.detach())
