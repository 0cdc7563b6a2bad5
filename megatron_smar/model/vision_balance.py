# SPDX-License-Identifier: Apache-2.0
"""Shares the work of a frozen vision encoder evenly between data-parallel replicas.

A sample has from no tile to 13, so in each micro-batch one replica has several times the tiles of another, and all wait
for it in the next collective. Here replicas with more than their share send pixels to those with fewer, and get the
features back. The encoder is frozen, so nothing is communicated in the backward pass: the connector's gradient is
computed where the samples are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Encoder = Callable[[Tensor], Tensor]


def even_shares(number: int, ranks: int, first: int = 0) -> list[int]:
    """Returns how many of a number of tiles each rank gets; `first` is the first rank that gets one more."""
    least, more = divmod(number, ranks)
    return [least + ((rank - first) % ranks < more) for rank in range(ranks)]


def moves(counts: Sequence[int]) -> list[list[int]]:
    """Returns how many tiles each rank sends to each other rank, so that no two differ by more than one tile.

    As few as possible are sent: a rank that has fewer than its share sends none.

    Args:
        counts: Number of tiles of each rank.

    Returns:
        For each rank the numbers that it sends to each rank, [ranks][ranks].
    """
    ranks = len(counts)
    least, more = divmod(sum(counts), ranks)
    by_count = sorted(range(ranks), key=lambda rank: -counts[rank])  # those with most keep one more
    shares = {rank: least + (place < more) for place, rank in enumerate(by_count)}
    sent = [[0] * ranks for _ in range(ranks)]
    free = [[rank, shares[rank] - counts[rank]] for rank in range(ranks) if counts[rank] < shares[rank]]
    for rank in range(ranks):
        surplus = counts[rank] - shares[rank]
        while surplus > 0:
            number = min(surplus, free[0][1])
            sent[rank][free[0][0]] = number
            surplus, free[0][1] = surplus - number, free[0][1] - number
            if not free[0][1]:
                free.pop(0)
    return sent


class TileExchange:
    """Lets the ranks of different replicas encode each other's tiles.

    Args:
        replicas: The ranks that hold different samples, one of each replica.
        on_host: The same ranks, as a group for tensors in the host's memory: numbers of tiles are known there, and
            exchanging them must not wait for the device.
    """

    def __init__(self, replicas: dist.ProcessGroup, on_host: dist.ProcessGroup) -> None:
        self.replicas, self._on_host = replicas, on_host

    def encode(self, tiles: Tensor, encoder: Encoder) -> Tensor:
        """Returns the features of this rank's tiles; called on all ranks, also on those without tiles.

        Args:
            tiles: This rank's tiles, [n, 3, H, W].
            encoder: Maps tiles [n, 3, H, W] to features [n, tokens, c], also for n = 0; without gradient.
        """
        sent = moves(self._counts(len(tiles)))
        if not any(map(any, sent)):
            return encoder(tiles)
        here = self.replicas.rank()
        leaving, coming = sent[here], [row[here] for row in sent]
        kept = len(tiles) - sum(leaving)
        foreign, arrival = self._exchange(tiles[kept:], leaving, coming)
        own = encoder(tiles[:kept])  # meanwhile the others' pixels arrive
        arrival.wait()
        returned, arrival = self._exchange(encoder(foreign), coming, leaving)
        arrival.wait()
        return torch.cat([own, returned])

    def _counts(self, number: int) -> list[int]:
        counts = torch.zeros(self.replicas.size(), dtype=torch.int64)
        counts[self.replicas.rank()] = number
        dist.all_reduce(counts, group=self._on_host)
        return counts.tolist()

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, dist.Work]:
        """Starts sending rows, in the order of the ranks that receive them; returns what will be received."""
        target = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(target, rows.contiguous(), received, sent, group=self.replicas, async_op=True)
        assert work is not None
        return target, work
