# SPDX-License-Identifier: Apache-2.0
"""Routing statistics of one MoE layer, and the single asynchronous all-reduce that makes them global.

They are equations 6 and 7 of SMAR, section 3.1, before the divisions, because only sums can be added up over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_smar.routing.modalities import modality_mask_from_ids


class RoutingStatistics(NamedTuple):
    """Sums over tokens, per modality m and expert e.

    Attributes:
        counts: Number of tokens of modality m that chose expert e, [M, E]; has no gradient.
        weights: Sum of the renormalized top-k weights (Eq. 5), [M, E]; carries the gradient.
        tokens: Number of tokens of modality m, [M].
    """

    counts: Tensor
    weights: Tensor
    tokens: Tensor

    def pack(self) -> Tensor:
        """Returns weights, counts and tokens side by side, without gradient, [M, 2E + 1]."""
        return torch.cat([self.weights.detach(), self.counts, self.tokens.unsqueeze(1)], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> RoutingStatistics:
        """Returns the statistics that are stored in one tensor [M, 2E + 1], as `pack` stores them."""
        experts = packed.shape[1] // 2
        weights, counts, tokens = packed.split([experts, experts, 1], dim=1)
        return cls(counts, weights, tokens.squeeze(1))


def routing_statistics(
    weights: Tensor, routing_map: Tensor, modality_ids: Tensor, num_modalities: int
) -> RoutingStatistics:
    """Returns the sums of equations 6 and 7 over the given tokens.

    Args:
        weights: Top-k weights renormalized over the chosen experts (Eq. 5), 0 where not chosen, [N, E].
        routing_map: The chosen experts, [N, E] bool.
        modality_ids: Modality ids [N], int: 0 .. M-1, or -1 for padding, which is not counted.
        num_modalities: M, the number of modalities.

    Returns:
        The sums, in float32 (float64 if the weights are float64).
    """
    mask = modality_mask_from_ids(modality_ids, num_modalities)
    return statistics_from_mask(weights, routing_map, mask)


def statistics_from_mask(weights: Tensor, routing_map: Tensor, modality_mask: Tensor) -> RoutingStatistics:
    """Same as `routing_statistics`, from one-hot modalities [N, M] bool: no indexing, no device synchronization."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    one_hot = modality_mask.to(dtype).t()
    counts = one_hot @ routing_map.to(dtype)
    return RoutingStatistics(counts, one_hot @ weights.to(dtype), one_hot.sum(dim=1))


class PendingStatistics:
    """An all-reduce in progress: launched when the routing is known, waited for after the experts have run.

    It is one all-reduce of M * (2E + 1) floats and the strategy's own sums. Counts and tokens are constants. The other
    sums are differentiable without any communication in the backward pass: every rank computes the same loss from the
    same global sums, W = sum_r W_r, so the derivative of the loss with respect to the global sum *is* its derivative
    with respect to this rank's share.

    Args:
        local: This rank's sums.
        group: Process group of the all-reduce; None for this rank only.
        sums: This rank's strategy-specific sums, by name, of any shape.
        packed: `local.pack()`, if it exists already; it is reduced in place.
    """

    def __init__(
        self,
        local: RoutingStatistics,
        group: dist.ProcessGroup | None,
        sums: Mapping[str, Tensor] | None = None,
        packed: Tensor | None = None,
    ) -> None:
        self._local = local
        self._sums = dict(sums or {})
        packed = local.pack() if packed is None else packed
        self._shape = packed.shape
        if self._sums:
            parts = [packed, *(part.detach() for part in self._sums.values())]
            packed = torch.cat([part.flatten().to(packed.dtype) for part in parts])
        self._packed = packed
        reduces = group is not None and dist.get_world_size(group) > 1
        self._work = dist.all_reduce(self._packed, group=group, async_op=True) if reduces else None

    def wait(self) -> tuple[RoutingStatistics, dict[str, Tensor]]:
        """Waits, and returns the global statistics and strategy sums; gradients flow to this rank's tokens."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        sizes = [self._shape.numel(), *(part.numel() for part in self._sums.values())]
        packed, *sums = self._packed.flatten().split(sizes)
        totals = {name: total.view_as(self._sums[name]) for name, total in zip(self._sums, sums, strict=True)}
        own = {name: _with_gradient(total, self._sums[name]) for name, total in totals.items()}
        statistics = RoutingStatistics.unpack(packed.view(self._shape))
        return statistics._replace(weights=_with_gradient(statistics.weights, self._local.weights)), own


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, local: Tensor) -> Tensor:
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _with_gradient(total: Tensor, local: Tensor) -> Tensor:
    """Returns the total; its gradient goes to this rank's share, without an operation."""
    result: Tensor = _WithGradient.apply(total, local.to(total.dtype))
    return result
