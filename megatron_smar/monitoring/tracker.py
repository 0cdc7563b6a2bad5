# SPDX-License-Identifier: Apache-2.0
"""Routing metrics on the console, in TensorBoard and in W&B, through Megatron's own tracker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_logging import (
    MetricEntry,
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.training import get_timers
from megatron.training.utils import print_rank_last
from numpy.typing import NDArray
from torch import Tensor

from megatron_smar.monitoring.collapse import CollapseWatch
from megatron_smar.monitoring.config import MonitorConfig
from megatron_smar.monitoring.load import MSI, layer_specialization, load_images, load_scalars
from megatron_smar.monitoring.recorder import routers_of
from megatron_smar.monitoring.throughput import ThroughputMeter, console_part
from megatron_smar.routing.router import MRD_DISTANCE, RoutingReport
from megatron_smar.routing.statistics import RoutingStatistics
from megatron_smar.routing.strategies.base import Metric

WINDOW = "sums since the last time"


@dataclass(frozen=True)
class Sums:
    """Sums over steps, on the host.

    Attributes:
        load: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
        weighted: For each layer and weighted metric the sum of the weighted values and the sum of the weights,
            [L, W, 2].
    """

    load: Tensor = field(default_factory=lambda: torch.zeros(()))
    weighted: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.load + other.load, self.weighted + other.weighted)


class RoutingMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics, which also reports how the modalities are routed.

    On the console every --log-interval steps, in TensorBoard and W&B every --tensorboard-log-interval steps:

    - the strategy's losses (`smar loss`) and Megatron's own auxiliary losses, reported as Megatron reports the main
      loss: on the console the mean over the steps since the last line, elsewhere the step's value;
    - `mrd distance`: the mean over the layers and over those micro-batches since the last line or point in which at
      least two modalities had tokens. A layer's mean is `moe/mrd_distance_layer_N`, N from 1, not on the console. The
      strategy's weighted metrics are reported in the same way, each with its own weights;
    - `msi`, the Modality Specialization Index, over all tokens since the last line or point; the other scalars of
      `load_scalars` are not on the console.

    Megatron also prints a line after a run's first step; the means on the next line include that step again.

    Every --log-interval steps, over all tokens since the previous interval: the images of `load_images`, the throughput
    (`ThroughputMeter`), and a warning if routing collapses. Sums over steps are kept on the device; they are reduced
    and read only in steps that report something, which are the same on every rank: the run's first step, and those at
    the two intervals.
    """

    def __init__(self, config: MonitorConfig | None = None) -> None:
        super().__init__()
        self.config = config or MonitorConfig()
        # This rank's sums since the last reduction, on the device: counts and tokens; weighted values and weights.
        self._window: Tensor | None = None  # [L, M, E + 1]
        self._weighted: Tensor | None = None  # [L, W, 2]
        own = [metric for metric in self.config.metrics if metric.weighted]
        self._weighted_metrics = [Metric(MRD_DISTANCE, weighted=True), *own]
        self._unwritten = self._unprinted = Sums()  # over all ranks, since the last logged point and the last interval
        self._collapses = CollapseWatch(
            self.config.collapse_threshold,
            self.config.top_k,
            self.config.modalities,
            self.config.router_learns,
            self.config.collapse_remedy,
            self.config.collapse_tokens,
        )
        self._begun = False
        self.meter: ThroughputMeter | None = None

    def watch(self, modules: Iterable[torch.nn.Module]) -> None:
        """Makes the modality-aware routers of these modules report to this tracker."""
        for router in routers_of(modules):
            router.observers.append(self.observe)

    def observe(self, report: RoutingReport) -> None:
        """Adds one layer's report of one micro-batch, without waiting for the device."""
        for name, value in report.losses.items():
            self._add_loss(name, value, report)
        self._add_statistics(report.statistics, report.layer, report.num_layers)
        if self._weighted is None:
            shape, device = (report.num_layers, len(self._weighted_metrics), 2), report.statistics.counts.device
            self._weighted = torch.zeros(shape, dtype=torch.float64, device=device)
        for metric, sums in zip(self._weighted_metrics, self._weighted[report.layer - 1], strict=True):
            if metric.name in report.measures:  # a metric that this layer does not report has no weight
                value, weight = report.measures[metric.name]
                total, weights = sums
                total.addcmul_(value.detach(), weight)
                weights.add_(weight)

    def _add_loss(self, name: str, value: Tensor, report: RoutingReport) -> None:
        """Adds a loss as Megatron's `record` does, which copies the sum once more."""
        if name not in self._metrics:
            zeros = torch.zeros(report.num_layers, device=value.device)
            self._metrics[name] = MetricEntry(zeros, needs_dp_avg=self.config.scope == "local")
        self._metrics[name].values[report.layer - 1].add_(value.detach())

    def _add_statistics(self, statistics: RoutingStatistics, layer_number: int, num_layers: int) -> None:
        modalities, experts = statistics.counts.shape
        if self._window is None:
            # Integers in float64, so that sums over many steps stay exact.
            shape, device = (num_layers, modalities, experts + 1), statistics.counts.device
            self._window = torch.zeros(shape, dtype=torch.float64, device=device)
        counts, tokens = self._window[layer_number - 1].split([experts, 1], dim=1)
        counts.add_(statistics.counts.detach())
        tokens.add_(statistics.tokens.detach().unsqueeze(1))

    def report(
        self, loss_scale: float, iteration: int, writer: Any = None, wandb_writer: Any = None, **kwargs: Any
    ) -> str:
        """Reports as Megatron's tracker does, once per step on every rank; returns the text for the console's line."""
        layers = _number_of_layers(kwargs)
        own = [metric.name for metric in self.config.metrics if not metric.weighted]
        names = [*(kwargs.pop("track_names", None) or []), *own]
        for name in names:
            self.ensure_initialized(name, layers)
        first, self._begun = not self._begun, True  # Megatron also prints a line after a run's first step
        writes = iteration % self.config.scalar_interval == 0
        ends = iteration % self.config.console_interval == 0
        due = (writer, wandb_writer) if writes else (None, None)
        kwargs["force_initialize"] = False  # the loop above has initialized them
        # Otherwise Megatron would read the values by layer from the device in each step, on ranks without a writer too.
        kwargs["per_layer_logging"] = writes and kwargs.get("per_layer_logging", False)
        log = super().report(loss_scale, iteration, *due, track_names=names, **kwargs)
        if writes or ends or first:
            sums = self._reduced_sums(layers, kwargs.get("pg_collection"))
            self._unwritten, self._unprinted = self._unwritten + sums, self._unprinted + sums
        if due != (None, None):
            self._log_scalars(self._scalars(self._unwritten), iteration, *due)
            self._unwritten = Sums()
        if ends or first:
            log += self._console_part() + self._throughput(iteration, ends, writer, wandb_writer)
        if ends:
            self._end_interval(iteration, writer, wandb_writer)
        return log

    def _throughput(self, iteration: int, ends: bool, writer: Any, wandb_writer: Any) -> str:
        """Logs how much the steps since the last interval computed per second; returns the text for the console."""
        if self.meter is None:
            return ""
        routed = float(self._unprinted.load[..., :-1].sum())
        if self.config.scope == "local":  # the load is then a replica's on average
            routed *= self.meter.config.replicas
        # Megatron's own timer, which does not run during saves and evaluation.
        seconds = get_timers()("interval-time").elapsed(reset=False)
        scalars = self.meter.report(seconds, routed, ends)
        if ends:
            self._log_scalars(scalars, iteration, writer, wandb_writer)
        return console_part(scalars)

    def _log_scalars(self, scalars: dict[str, Any], iteration: int, writer: Any, wandb_writer: Any) -> None:
        """Logs as Megatron does, but all scalars in one W&B call: hundreds of calls, one per scalar, are slow."""
        super()._log_scalars(scalars, iteration, writer, None)
        if wandb_writer is not None and scalars:
            wandb_writer.log(scalars, iteration)

    def _reduced_sums(self, layers: int, groups: Any) -> Sums:
        """Returns the sums of all layers and replicas since the last call, with one reduction and one device read.

        The sums are reduced as Megatron reduces its own per-layer values: summed over the pipeline stages, which have
        different layers, then averaged over the replicas if each has its own statistics (--smar-scope local). The
        average divides all sums by the same number, so it changes no share and no mean.
        """
        config, weighted, window = self.config, self._weighted, self._window
        if window is None or weighted is None:  # a stage without MoE layers
            device = torch.cuda.current_device()
            shape = (layers, len(config.modalities), config.num_experts + 1)
            window = torch.zeros(shape, dtype=torch.float64, device=device)
            weighted = window.new_zeros(layers, len(self._weighted_metrics), 2)
        packed = torch.cat([window.flatten(1), weighted.flatten(1)], dim=1)
        self._metrics[WINDOW] = MetricEntry(packed, needs_dp_avg=config.scope == "local")
        self._sync_metrics([WINDOW], groups)
        del self._metrics[WINDOW]
        self._window = self._weighted = None
        columns = weighted[0].numel()
        load, weighted = packed.cpu().split([packed.shape[1] - columns, columns], dim=1)
        return Sums(load.unflatten(1, window.shape[1:]), weighted.unflatten(1, (-1, 2)))

    def _weighted_means(self, sums: Sums) -> Iterator[tuple[Metric, dict[int, float]]]:
        """Yields each weighted metric that has a value, with its mean by layer number (from 1)."""
        for place, metric in enumerate(self._weighted_metrics):
            means = weighted_means(sums.weighted[:, place])
            if means:
                yield metric, means

    def _scalars(self, sums: Sums) -> dict[str, float]:
        """Returns the scalars to log since the last point, by tag: weighted metrics and those of `load_scalars`."""
        scalars: dict[str, float] = {}
        for metric, means in self._weighted_means(sums):
            tag = metric.name.replace(" ", "_")
            scalars |= {f"moe/{tag}_layer_{layer}": value for layer, value in means.items()}
            scalars[metric.name] = fmean(means.values())
        return scalars | load_scalars(sums.load, self.config)

    def _console_part(self) -> str:
        indices = layer_specialization(self._unprinted.load)
        log = "".join(
            f" {metric.name}: {fmean(means.values()):.4f} |"
            for metric, means in self._weighted_means(self._unprinted)
            if metric.on_console
        )
        return log + (f" {MSI}: {fmean(indices.values()):.3f} |" if indices else "")

    def _end_interval(self, iteration: int, writer: Any, wandb_writer: Any) -> None:
        """Logs the images and prints the collapse warning at the end of a console interval."""
        if writer is not None or wandb_writer is not None:
            _log_images(load_images(self._unprinted.load, self.config.modalities), iteration, writer, wandb_writer)
        warning = self._collapses.check(self._unprinted.load)
        if warning:
            print_rank_last(f"WARNING: iteration {iteration}: {warning}")
        self._unprinted = Sums()


def _number_of_layers(kwargs: dict[str, Any]) -> int:
    return int(kwargs["num_layers"] + (kwargs.get("mtp_num_layers") or 0))


def weighted_means(sums: Tensor) -> dict[int, float]:
    """Returns a weighted metric's mean by layer number (from 1), for layers whose weights are not all 0.

    Args:
        sums: For each layer the sum of the weighted values and the sum of the weights, [L, 2].
    """
    return {layer: total / number for layer, (total, number) in enumerate(sums.tolist(), start=1) if number > 0}


def _log_images(images: dict[str, NDArray[np.uint8]], iteration: int, writer: Any, wandb_writer: Any) -> None:
    for name, image in images.items():
        if writer is not None:
            writer.add_image(name, image, iteration, dataformats="HWC")
        if wandb_writer is not None:
            wandb_writer.log({name: wandb_writer.Image(image)}, iteration)


def watch_routing(model: torch.nn.Module) -> None:
    """Makes a model's routers report to the tracker that `install_metrics` has installed."""
    tracker = get_moe_metrics_tracker()
    assert isinstance(tracker, RoutingMetricsTracker)
    tracker.watch([model])


def measure_throughput(meter: ThroughputMeter) -> None:
    """Makes the tracker that `install_metrics` has installed report the throughput."""
    tracker = get_moe_metrics_tracker()
    assert isinstance(tracker, RoutingMetricsTracker)
    tracker.meter = meter


def install_metrics(config: MonitorConfig) -> None:
    """Makes Megatron's training loop report the routing metrics that a config asks for."""
    set_moe_metrics_tracker(RoutingMetricsTracker(config))
