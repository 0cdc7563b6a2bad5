# SPDX-License-Identifier: Apache-2.0
"""Records the routing of a model over many batches, in evaluation too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_smar.routing.mrd import modality_routing_distribution, mrd_distance
from megatron_smar.routing.router import ModalityAwareRouter, RoutingReport
from megatron_smar.routing.specialization import (
    expert_load,
)
from megatron_smar.routing.statistics import RoutingStatistics


class RoutingRecorder:
    """Sums the routing statistics of every MoE layer over many batches, in evaluation too.

    Attributes:
        statistics: Summed routing statistics by layer number (from 1).
    """

    def __init__(self) -> None:
        self.statistics: dict[int, RoutingStatistics] = {}

    def __call__(self, report: RoutingReport) -> None:
        """Adds one layer's report of one micro-batch."""
        new = RoutingStatistics(*(tensor.detach().double() for tensor in report.statistics))
        old = self.statistics.get(report.layer)
        self.statistics[report.layer] = (
            new if old is None else RoutingStatistics(*(a + b for a, b in zip(old, new, strict=True)))
        )

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sums what the ranks of a group have recorded, where their routers' statistics are not global."""
        for statistics in self.statistics.values():
            for tensor in statistics:
                dist.all_reduce(tensor, group=group)

    def distances(self, top_k: int, eps: float) -> dict[int, float]:
        """Returns the MRD distance of each layer over everything recorded."""
        return {
            layer: float(mrd_distance(modality_routing_distribution(s, top_k, eps), s.tokens > 0))
            for layer, s in sorted(self.statistics.items())
        }

    def expert_shares(self) -> dict[int, Tensor]:
        """Returns the share of each modality's token slots per expert, [M, E], by layer (the paper's Figure 4)."""
        return {layer: expert_load(s.counts) for layer, s in sorted(self.statistics.items())}


def routers_of(modules: Iterable[torch.nn.Module]) -> list[ModalityAwareRouter]:
    """Returns the modality-aware routers in the given modules."""
    return [m for module in modules for m in module.modules() if isinstance(m, ModalityAwareRouter)]


@contextmanager
def recorded_routing(modules: Iterable[torch.nn.Module]) -> Iterator[RoutingRecorder]:
    """Records the routing of every modality-aware router in the given modules while the context lasts."""
    recorder = RoutingRecorder()
    routers = routers_of(modules)
    for router in routers:
        router.recorders.append(recorder)
    try:
        yield recorder
    finally:
        for router in routers:
            router.recorders.remove(recorder)
