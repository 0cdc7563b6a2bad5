# SPDX-License-Identifier: Apache-2.0
"""Sums over the tokens of each sample, including samples that are split across ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class TokensOfSamples:
    """Sums over the tokens of each sample of a micro-batch (`strategies.base.SampleSums`).

    A sample is a row of the micro-batch, or a sequence of a pack. Its tokens can be sharded over the tensor- and
    context-parallel ranks; then the sums are reduced over those ranks alone, with one all-reduce. As with the global
    statistics (`routing.statistics`), the gradient needs no communication.

    Args:
        sample_ids: Index of each token's sample, [N].
        number: S, at least the number of samples.
        group: The ranks that share the replica's samples.
    """

    def __init__(self, sample_ids: Tensor, number: int, group: dist.ProcessGroup) -> None:
        self.sample_ids, self.number, self.group = sample_ids, number, group
        self.ranks = group.size()

    def __call__(self, values: Tensor) -> Tensor:
        """Returns the sums [S, C] of values [N, C] over each sample's tokens; gradients pass to this rank's tokens."""
        numbers = torch.arange(self.number, device=values.device)
        # A matrix product, because index_add is nondeterministic on a GPU.
        local = (numbers.unsqueeze(1) == self.sample_ids).to(values.dtype) @ values
        if self.ranks == 1:
            return local
        total = local.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + (local - local.detach())


def share_of_ranks(value: Tensor, ranks: int) -> Tensor:
    """Returns this rank's share of a value that `ranks` ranks have computed alike, for a sum over all ranks.

    The gradient is that of the full value, because each rank's gradient covers its own tokens only.
    """
    return value.detach() / ranks + (value - value.detach())
