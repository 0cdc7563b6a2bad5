# SPDX-License-Identifier: Apache-2.0
"""Routing metrics on the console, in TensorBoard and in W&B, through Megatron's own tracker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from torch import Tensor

from megatron_smar.routing.mrd import modality_routing_distribution, mrd_distance
from megatron_smar.routing.router import COMPARABLE, MRD_DISTANCE, SMAR_LOSS, ModalityAwareRouter
from megatron_smar.routing.statistics import RoutingStatistics


class RoutingMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics, which also reports the routers' `smar loss` and `mrd distance`.

    The loss joins Megatron's per-interval averages. The distance is the mean over the layers and micro-batches in which
    at least two modalities had tokens; per layer it goes to `moe/mrd_distance_layer_N`, N from 1.
    """

    def report(
        self, loss_scale: float, iteration: int, writer: Any = None, wandb_writer: Any = None, **kwargs: Any
    ) -> str:
        """As Megatron's, once per step on every rank; returns the console's part."""
        names = [*(kwargs.pop("track_names", None) or []), SMAR_LOSS, MRD_DISTANCE, COMPARABLE]
        distances = self._mean_distances(kwargs, names)
        scalars: dict[str, Tensor] = {}
        if distances is not None:
            scalars = {f"moe/mrd_distance_layer_{layer}": value for layer, value in distances}
            scalars[MRD_DISTANCE] = torch.stack([value for _, value in distances]).mean()
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        kwargs["force_initialize"] = False
        log = super().report(loss_scale, iteration, writer, wandb_writer, track_names=names[:-2], **kwargs)
        return log + (f" {MRD_DISTANCE}: {scalars[MRD_DISTANCE]:.4f} |" if scalars else "")

    def _mean_distances(self, kwargs: dict[str, Any], names: list[str]) -> list[tuple[int, Tensor]] | None:
        """(layer, mean distance) of the layers that had something to compare; None where none had."""
        layers = kwargs["num_layers"] + (kwargs.get("mtp_num_layers") or 0)
        for name in names:
            self.ensure_initialized(name, layers)
        self._sync_metrics([MRD_DISTANCE, COMPARABLE], kwargs.get("pg_collection"))
        total, number = self.metrics[MRD_DISTANCE].values, self.metrics[COMPARABLE].values
        return [(i + 1, total[i] / number[i]) for i in range(layers) if number[i] > 0] or None


def install_metrics() -> None:
    """Makes Megatron's training loop report the routing metrics."""
    set_moe_metrics_tracker(RoutingMetricsTracker())


class RoutingRecorder:
    """Adds up the routing statistics of every MoE layer over many batches, in evaluation too.

    Attributes:
        statistics: By layer number (from 1).
    """

    def __init__(self) -> None:
        self.statistics: dict[int, RoutingStatistics] = {}

    def __call__(self, layer: int, statistics: RoutingStatistics) -> None:
        """Takes one layer's global statistics of one micro-batch."""
        new = RoutingStatistics(*(tensor.detach().double() for tensor in statistics))
        old = self.statistics.get(layer)
        self.statistics[layer] = (
            new if old is None else RoutingStatistics(*(a + b for a, b in zip(old, new, strict=True)))
        )

    def distances(self, top_k: int, eps: float) -> dict[int, float]:
        """MRD distance of each layer over everything recorded."""
        return {
            layer: float(mrd_distance(modality_routing_distribution(s, top_k, eps), s.tokens > 0))
            for layer, s in sorted(self.statistics.items())
        }

    def expert_shares(self) -> dict[int, Tensor]:
        """Share of each modality's token slots per expert, [M, E] by layer (the paper's Figure 4)."""
        return {
            layer: s.counts / s.counts.sum(dim=1, keepdim=True).clamp(min=1)
            for layer, s in sorted(self.statistics.items())
        }


@contextmanager
def recorded_routing(modules: Iterable[torch.nn.Module]) -> Iterator[RoutingRecorder]:
    """Records the routing of every modality-aware router in the given modules while the context lasts."""
    recorder = RoutingRecorder()
    routers = [m for module in modules for m in module.modules() if isinstance(m, ModalityAwareRouter)]
    for router in routers:
        router.observers.append(recorder)
    try:
        yield recorder
    finally:
        for router in routers:
            router.observers.remove(recorder)
