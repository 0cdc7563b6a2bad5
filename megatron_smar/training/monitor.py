# SPDX-License-Identifier: Apache-2.0
"""Routing metrics on the console, in TensorBoard and in W&B, through Megatron's own tracker."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.transformer.moe.moe_logging import MetricEntry, MoEMetricsTracker, set_moe_metrics_tracker
from megatron.training import get_args
from megatron.training.utils import print_rank_last
from numpy.typing import NDArray
from torch import Tensor

from megatron_smar.routing.modalities import TEXT, VISION
from megatron_smar.routing.mrd import modality_routing_distribution, mrd_distance
from megatron_smar.routing.router import COMPARABLE, MRD_DISTANCE, SMAR_LOSS, ModalityAwareRouter
from megatron_smar.routing.specialization import (
    dropped_share,
    expert_load,
    load_entropy,
    modality_specialization_index,
)
from megatron_smar.routing.statistics import RoutingStatistics

MSI = "msi"
EXPERT_LOAD = "expert load"


def modality_name(modality: int) -> str:
    """A modality's name in logs, by its id: text, vision, then modality_2 and so on."""
    return {TEXT: "text", VISION: "vision"}.get(modality, f"modality_{modality}")


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured of the experts' load, and when.

    Attributes:
        num_experts: E; a pipeline stage without MoE layers must know it to join the reduction.
        top_k: K, experts per token.
        num_modalities: M.
        scope: Of the routing statistics: with `local`, data-parallel replicas have their own.
        scalar_interval: Steps between points in TensorBoard and W&B.
        console_interval: Steps between lines on the console.
        capacity_limited: Whether tokens can be dropped (--moe-expert-capacity-factor).
        collapse_threshold: A warning is given when more than this share of a modality's tokens chooses one expert. 1 is
            the most there is, K experts per token, and switches the warning off; even load gives K / E.
    """

    num_experts: int = 1
    top_k: int = 1
    num_modalities: int = 2
    scope: Literal["global", "local"] = "global"
    scalar_interval: int = 1
    console_interval: int = 1
    capacity_limited: bool = False
    collapse_threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.collapse_threshold <= 1:
            raise ValueError(
                f"--moe-collapse-threshold is {self.collapse_threshold}; it is a share of a modality's tokens: "
                "give more than 0 and at most 1, which switches the warning off."
            )

    @classmethod
    def from_arguments(cls, args: Namespace) -> MonitorConfig:
        """The config that Megatron's flags and ours ask for."""
        writes = bool(args.tensorboard_dir or getattr(args, "wandb_project", ""))
        return cls(
            num_experts=args.num_experts or 1,
            top_k=args.moe_router_topk,
            scope=args.smar_scope,
            scalar_interval=args.tensorboard_log_interval if writes else args.log_interval,
            console_interval=args.log_interval,
            capacity_limited=args.moe_expert_capacity_factor is not None,
            collapse_threshold=args.moe_collapse_threshold,
        )


class RoutingMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics, which also reports how the modalities are routed.

    Every step: `smar loss` joins Megatron's per-interval averages; `mrd distance` is the mean over the layers and
    micro-batches in which at least two modalities had tokens, and per layer it goes to `moe/mrd_distance_layer_N`, N
    from 1.

    Every --tensorboard-log-interval steps, over all tokens since the last time: the scalars of `load_scalars`. Every
    --log-interval steps, over all tokens since the last time: `msi` on the console, the images of `load_images`, and a
    warning if routing collapses. The sums are added up on the device, and reduced only then.
    """

    def __init__(self, config: MonitorConfig | None = None) -> None:
        super().__init__()
        self.config = config or MonitorConfig()
        self._window: Tensor | None = None  # [L, M, E + 1]: counts and tokens of this rank's layers, not yet reduced
        self._unwritten = self._unprinted = torch.zeros(())  # the same after reduction, since the last point and line
        self._collapses = CollapseWatch(self.config)
        self._begun = False

    def record_statistics(self, statistics: RoutingStatistics, layer_number: int, num_layers: int) -> None:
        """Adds one layer's reduced statistics of one micro-batch, without waiting for the device."""
        modalities, experts = statistics.counts.shape
        if self._window is None:
            # Whole numbers in float64: sums of any length stay exact.
            shape, device = (num_layers, modalities, experts + 1), statistics.counts.device
            self._window = torch.zeros(shape, dtype=torch.float64, device=device)
        counts, tokens = self._window[layer_number - 1].split([experts, 1], dim=1)
        counts.add_(statistics.counts.detach())
        tokens.add_(statistics.tokens.detach().unsqueeze(1))

    def report(
        self, loss_scale: float, iteration: int, writer: Any = None, wandb_writer: Any = None, **kwargs: Any
    ) -> str:
        """As Megatron's, once per step on every rank; returns the console's part."""
        names = [*(kwargs.pop("track_names", None) or []), SMAR_LOSS, MRD_DISTANCE, COMPARABLE]
        distances = self._mean_distances(kwargs, names)
        scalars: dict[str, float] = {}
        if distances:
            scalars = {f"moe/mrd_distance_layer_{layer}": value for layer, value in distances.items()}
            scalars[MRD_DISTANCE] = fmean(distances.values())
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        kwargs["force_initialize"] = False
        log = super().report(loss_scale, iteration, writer, wandb_writer, track_names=names[:-2], **kwargs)
        log += f" {MRD_DISTANCE}: {scalars[MRD_DISTANCE]:.4f} |" if scalars else ""
        return log + self._report_load(iteration, writer, wandb_writer, kwargs)

    def _log_scalars(self, scalars: dict[str, Any], iteration: int, writer: Any, wandb_writer: Any) -> None:
        """As Megatron's, with one call of W&B for all: hundreds of them, one per scalar, take a noticeable time."""
        super()._log_scalars(scalars, iteration, writer, None)
        if wandb_writer is not None and scalars:
            wandb_writer.log(scalars, iteration)

    def _mean_distances(self, kwargs: dict[str, Any], names: list[str]) -> dict[int, float]:
        """Mean distance by layer, of the layers that had something to compare."""
        layers = _number_of_layers(kwargs)
        for name in names:
            self.ensure_initialized(name, layers)
        self._sync_metrics([MRD_DISTANCE, COMPARABLE], kwargs.get("pg_collection"))
        sums = torch.stack([self.metrics[name].values for name in (MRD_DISTANCE, COMPARABLE)], dim=1).tolist()
        return {layer: total / number for layer, (total, number) in enumerate(sums, start=1) if number > 0}

    def _report_load(self, iteration: int, writer: Any, wandb_writer: Any, kwargs: dict[str, Any]) -> str:
        """Writes what is due of the experts' load; returns the console's part where Megatron prints a line."""
        first, self._begun = not self._begun, True  # Megatron also prints a line after its first step
        writes = iteration % self.config.scalar_interval == 0
        ends = iteration % self.config.console_interval == 0
        if not (writes or ends or first):
            return ""
        window = self._reduced_window(_number_of_layers(kwargs), kwargs.get("pg_collection"))
        self._unwritten, self._unprinted = self._unwritten + window, self._unprinted + window
        if writes and (writer is not None or wandb_writer is not None):
            self._log_scalars(load_scalars(self._unwritten, self.config), iteration, writer, wandb_writer)
            self._unwritten = torch.zeros(())
        indices = layer_specialization(self._unprinted)
        if ends:
            _log_images(load_images(self._unprinted), iteration, writer, wandb_writer)
            warning = self._collapses.check(self._unprinted)
            if warning:
                print_rank_last(f"WARNING: iteration {iteration}: {warning}")
            self._unprinted = torch.zeros(())
        return f" {MSI}: {fmean(indices.values()):.3f} |" if indices and (ends or first) else ""

    def _reduced_window(self, layers: int, groups: Any) -> Tensor:
        """Counts and tokens since the last time, of all layers and replicas, [L, M, E + 1] on the host.

        Reduced as Megatron reduces its own values per layer: summed over the pipeline's stages, which hold different
        layers, then averaged over replicas where those differ, which changes no share.
        """
        config = self.config
        if self._window is None:  # a stage without MoE layers, or a step without any token
            shape = (layers, config.num_modalities, config.num_experts + 1)
            self._window = torch.zeros(shape, dtype=torch.float64, device=self.metrics[COMPARABLE].values.device)
        self._metrics[EXPERT_LOAD] = MetricEntry(self._window, needs_dp_avg=config.scope == "local")
        self._sync_metrics([EXPERT_LOAD], groups)
        del self._metrics[EXPERT_LOAD]  # Megatron's `clear` zeroes its entries every step and after evaluation
        reduced = self._window.to("cpu", copy=True)
        self._window.zero_()
        return reduced


def _number_of_layers(kwargs: dict[str, Any]) -> int:
    return int(kwargs["num_layers"] + (kwargs.get("mtp_num_layers") or 0))


def layer_specialization(sums: Tensor) -> dict[int, float]:
    """Modality Specialization Index by layer number from 1, of the layers with tokens of at least two modalities.

    Args:
        sums: [L, M, E + 1], the counts per expert, then the tokens, of each layer and modality.
    """
    counts = sums[..., :-1]
    values = modality_specialization_index(expert_load(counts)).tolist()
    comparable = ((counts.sum(dim=-1) > 0).sum(dim=-1) >= 2).tolist()
    return {layer: values[layer - 1] for layer, has_two in enumerate(comparable, start=1) if has_two}


def load_scalars(sums: Tensor, config: MonitorConfig) -> dict[str, float]:
    """What is written of the experts' load, by tag; layers count from 1, and absent modalities are left out.

    - `moe/msi_layer_N`: Modality Specialization Index, and `msi`, its mean over the layers;
    - `moe/load_entropy_layer_N/<modality>`: entropy of the load, in nats, and `moe/load_entropy_share/<modality>`: as a
      share of log E, the mean over the layers;
    - `moe/max_load_layer_N/<modality>`: the largest share of the modality's token slots that one expert has;
    - `moe/dropped_layer_N/<modality>`: the share of its slots that was dropped, where capacity is limited;
    - `moe/token_share/<modality>`: its share of all tokens.

    Args:
        sums: [L, M, E + 1], the counts per expert, then the tokens, of each layer and modality.
        config: Of the monitor.
    """
    counts, tokens = sums[..., :-1], sums[..., -1]
    load = expert_load(counts)
    entropy = load_entropy(load)
    columns = {"load_entropy": entropy, "max_load": load.amax(dim=-1)}
    if config.capacity_limited:
        columns["dropped"] = dropped_share(counts, tokens, config.top_k)
    indices = layer_specialization(sums)
    scalars = {f"moe/msi_layer_{layer}": value for layer, value in indices.items()}
    if indices:
        scalars[MSI] = fmean(indices.values())
    for layer, modality in (tokens > 0).nonzero().tolist():
        for name, values in columns.items():
            scalars[f"moe/{name}_layer_{layer + 1}/{modality_name(modality)}"] = float(values[layer, modality])
    for modality in (tokens.sum(dim=0) > 0).nonzero().flatten().tolist():
        name = modality_name(modality)
        scalars[f"moe/token_share/{name}"] = float(tokens[:, modality].sum() / tokens.sum())
        evenness = entropy[tokens[:, modality] > 0, modality].mean() / math.log(max(load.shape[-1], 2))
        scalars[f"moe/load_entropy_share/{name}"] = float(evenness)
    return scalars


def load_images(sums: Tensor, cell: int = 8) -> dict[str, NDArray[np.uint8]]:
    """The whole load as one grey image per modality, [L * cell, E * cell] by tag `moe/load/<modality>`.

    One row per layer from the top, one column per expert: the paper's Figure 4 at a glance, where a scalar for each of
    thousands of experts would drown a dashboard. Brightness is the square root of the share of the modality's tokens
    that choose the expert, from black (none) to white (all), the same at every step.

    Args:
        sums: [L, M, E + 1], the counts per expert, then the tokens, of each layer and modality.
        cell: Pixels per side of an expert's square.
    """
    shares = chosen_share(sums)
    grey = (255 * shares.sqrt()).round().to(torch.uint8).repeat_interleave(cell, 0).repeat_interleave(cell, 2)
    present = (sums[..., -1].sum(dim=0) > 0).nonzero().flatten().tolist()
    return {f"moe/load/{modality_name(modality)}": grey[:, modality].numpy() for modality in present}


def chosen_share(sums: Tensor) -> Tensor:
    """Share of each modality's tokens that choose each expert, [L, M, E]; K times the load if nothing is dropped."""
    counts, tokens = sums[..., :-1], sums[..., -1:]
    return counts / torch.where(tokens > 0, tokens, 1.0)


class CollapseWatch:
    """Tells when nearly all tokens of a modality choose the same expert (the paper's Figure 4c), and tells it once.

    An expert that has been told is not told again before an interval has shown it recovered. An interval with fewer
    than 16 E tokens of a modality shows nothing of it.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._known: set[tuple[int, int, int]] = set()  # layer, modality, expert

    def check(self, sums: Tensor, most: int = 8) -> str | None:
        """The warning that an interval calls for, one sentence, or None.

        Args:
            sums: [L, M, E + 1], the counts per expert, then the tokens, of each layer and modality.
            most: Experts that are named; of further ones the number is told.
        """
        shares = chosen_share(sums)
        experts = shares.shape[-1]
        enough = sums[..., -1:] >= 16 * experts  # the patches of one image resemble each other: a few prove nothing
        if self._config.top_k >= experts:  # every token chooses every expert
            return None
        collapsed = {tuple(place) for place in ((shares > self._config.collapse_threshold) & enough).nonzero().tolist()}
        unknown = sorted(collapsed - self._known)
        self._known = collapsed | {place for place in self._known if not enough[place[:2]]}
        if not unknown:
            return None
        told = [
            f"{100 * float(shares[layer, modality, expert]):.1f}% of the {modality_name(modality)} tokens choose "
            f"expert {expert} of layer {layer + 1}"
            for layer, modality, expert in unknown[:most]
        ]
        more = f", and {len(unknown) - most} more" if len(unknown) > most else ""
        return (
            f"routing collapses: {', '.join(told)}{more} (experts count from 0; --moe-collapse-threshold "
            f"{self._config.collapse_threshold:g}). SMAR's authors saw this with a band too low: raise --smar-d-min "
            "and --smar-d-max, or balance with --moe-aux-loss-coeff."
        )


def _log_images(images: dict[str, NDArray[np.uint8]], iteration: int, writer: Any, wandb_writer: Any) -> None:
    for name, image in images.items():
        if writer is not None:
            writer.add_image(name, image, iteration, dataformats="HW")
        if wandb_writer is not None:
            wandb_writer.log({name: wandb_writer.Image(image)}, iteration)


def install_metrics() -> None:
    """Makes Megatron's training loop report the routing metrics, as its parsed flags and ours ask for."""
    set_moe_metrics_tracker(RoutingMetricsTracker(MonitorConfig.from_arguments(get_args())))


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
        return {layer: expert_load(s.counts) for layer, s in sorted(self.statistics.items())}


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
