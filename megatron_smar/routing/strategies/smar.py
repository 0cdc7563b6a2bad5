# SPDX-License-Identifier: Apache-2.0
"""Soft Modality-Aware Routing (arXiv 2506.06406): a tolerance band on the distance between the modalities' routing."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_smar.routing.fusion import FusedFunction, constant
from megatron_smar.routing.strategies.base import (
    BALANCE_REMEDY,
    NO_FLAG,
    AuxiliaryLoss,
    LayerRouting,
    Metric,
    RoutedLayer,
    RoutingStrategy,
    StrategyConfig,
)

SMAR_LOSS = "smar loss"


def smar_loss(distance: Tensor, d_min: float, d_max: float) -> Tensor:
    """Returns how far a distance is outside the band [d_min, d_max]: 0 inside, slope -1 below and +1 above (Eq. 13)."""
    return (distance - distance.clamp(d_min, d_max)).abs()


@FusedFunction
def _outside(distance: Tensor, comparable: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how far a distance is outside the band, with its sign and without."""
    d_min, d_max = band.unbind()
    outside = (distance - distance.clamp(d_min, d_max)) * comparable
    return outside, outside.abs()


@FusedFunction
def _gradient_outside(gradient: Tensor, outside: Tensor) -> Tensor:
    return gradient * outside.sgn()


class _BandLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: Tensor, comparable: Tensor, d_min: float, d_max: float) -> Tensor:
        outside, value = _outside(distance, comparable, constant((d_min, d_max), distance.dtype, distance.device))
        ctx.save_for_backward(outside)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient_outside(gradient, *ctx.saved_tensors), None, None, None


def band_loss(distance: Tensor, comparable: Tensor, d_min: float, d_max: float) -> Tensor:
    """Same as `smar_loss` times `comparable`, value and gradient, in 4 operations forward and 2 backward.

    Args:
        distance: A layer's distance, a scalar; 0 where it is not defined.
        comparable: 1 where it is defined, else 0.
        d_min: Lower end of the band.
        d_max: Upper end of the band.
    """
    result: Tensor = _BandLoss.apply(distance, comparable, d_min, d_max)
    return result


class LayerSettings(NamedTuple):
    """One layer's settings in --smar-band-file; None where the layer has the common ones.

    Attributes:
        band: The tolerance band (d_min, d_max).
        coeff: Weight of the SMAR loss.
    """

    band: tuple[float, float] | None = None
    coeff: float | None = None


@dataclass(frozen=True)
class SmarConfig(StrategyConfig):
    """Settings of SMAR. The defaults are the paper's (its Table 7 and section 4.1).

    Attributes:
        coeff: Weight of the SMAR loss, beta of the paper's Eq. 14.
        d_min: Lower end of the tolerance band on the distance between the modalities' routing distributions, in nats
            (the paper: 1.0 for MoE-LLaVA).
        d_max: Upper end of the band (the paper: 1.5 for MoE-LLaVA).
        band_file: Settings of individual MoE layers, a JSON object by layer number (from 1). Each is a band, such as
            {"1": [0.5, 1.0]}, or a band, a coefficient or both: {"1": {"band": [0.5, 1.0], "coeff": 0.1}}. What it
            leaves out is [--smar-d-min, --smar-d-max] and --smar-coeff.
        start_iter: Step from which the SMAR loss acts.
        warmup_iters: Steps over which --smar-coeff rises linearly from 0; with 0 it has its full value from the start.
        end_iter: Step from which the SMAR loss no longer acts; it is reported as before. Without it, the loss acts
            until the end.
        layers: The content of `band_file`, by layer number.
        acts: Whether the loss acts at all; if not, it is only reported.
    """

    name = "smar"
    title = "with the band loss on the distance between modalities (the paper: stage 2)"
    metrics = (Metric(SMAR_LOSS),)
    trains_modality_bias = True
    of_a_run = ("coeff", "d_min", "d_max", "band_file_content")
    collapse_remedy = (
        f"SMAR's authors saw this with a band too low: raise --smar-d-min and --smar-d-max, or {BALANCE_REMEDY}"
    )

    coeff: float = 0.01
    d_min: float = 1.5
    d_max: float = 2.0
    band_file: Path | None = None
    start_iter: int = 0
    warmup_iters: int = 0
    end_iter: int | None = None
    layers: Mapping[int, LayerSettings] = field(default_factory=dict, metadata=NO_FLAG)
    acts: bool = field(default=True, metadata=NO_FLAG)

    def __post_init__(self) -> None:
        if self.band_file is not None:
            object.__setattr__(self, "layers", read_layers(self.band_file))
        if not 0 <= self.d_min <= self.d_max:
            raise ValueError(
                f"--smar-d-min {self.d_min} and --smar-d-max {self.d_max} are not a band: "
                "give 0 <= d_min <= d_max (the paper's are 1.5 and 2.0)."
            )
        if not 0 <= self.coeff < math.inf:
            raise ValueError(f"--smar-coeff is {self.coeff}; it must be 0 or more (the paper's is 0.01).")
        for layer, (band, coeff) in self.layers.items():
            if band is not None and not 0 <= band[0] <= band[1]:
                raise ValueError(
                    f"--smar-band-file gives layer {layer} [{band[0]}, {band[1]}], which is not a band: "
                    "give 0 <= d_min <= d_max."
                )
            if coeff is not None and not 0 <= coeff < math.inf:
                raise ValueError(f"--smar-band-file gives layer {layer} the coefficient {coeff}; give 0 or more.")
        for name in ("start_iter", "warmup_iters"):
            if getattr(self, name) < 0:
                raise ValueError(f"--smar-{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more.")
        if self.end_iter is not None and self.end_iter <= self.start_iter:
            raise ValueError(
                f"--smar-end-iter is {self.end_iter}, but the loss acts from --smar-start-iter {self.start_iter}; give "
                "a later step, or --smar-coeff 0 for no loss."
            )

    def build(self, layer: RoutedLayer) -> Smar:
        """Builds the strategy's module for one layer."""
        return Smar(self, layer)

    def band(self, layer: int) -> tuple[float, float]:
        """Returns the tolerance band (d_min, d_max) of a layer, by its number from 1."""
        own = self.layers.get(layer, LayerSettings()).band
        return (self.d_min, self.d_max) if own is None else own

    def coefficient(self, layer: int, iteration: int) -> float:
        """Returns a layer's beta in a step (numbered from 0), with the warm-up; 0 where the loss does not act."""
        own = self.layers.get(layer, LayerSettings()).coeff
        return self.acts * self.share(iteration) * (self.coeff if own is None else own)

    def share(self, iteration: int) -> float:
        """Returns the share of beta that acts in a step (numbered from 0).

        It is 0 before `start_iter`, then rises to 1 over `warmup_iters` steps, and is 0 again from `end_iter`.
        """
        if self.end_iter is not None and iteration >= self.end_iter:
            return 0.0
        steps = iteration - self.start_iter + 1
        return min(max(steps, 0) / max(self.warmup_iters, 1), 1.0)

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks that the layers in --smar-band-file are MoE layers.

        Stores the file's content among the flags, which a checkpoint keeps: a run is resumed with the same settings,
        whatever its file is called by then.
        """
        without = [] if moe_layers is None else sorted(set(self.layers) - set(moe_layers))
        if without:
            raise ValueError(
                f"--smar-band-file names layer {without[0]}, but the MoE layers are {list(moe_layers or ())}; "
                "correct its numbers."
            )
        if self.layers:
            args.smar_band_file_content = {layer: tuple(settings) for layer, settings in sorted(self.layers.items())}

    @classmethod
    def check_unused(cls, args: Namespace) -> None:
        """Refuses --smar-band-file and --smar-end-iter where another strategy is chosen."""
        for name in ("band_file", "end_iter"):
            if getattr(args, f"smar_{name}") is not None:
                raise ValueError(
                    f"{cls.flag(name)} has no effect with --modality-routing {args.modality_routing}; leave it out."
                )

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        own = f", layers of {self.band_file}" if self.band_file else ""
        end = f" until step {self.end_iter}" if self.end_iter is not None else ""
        return f"SMAR: band [{self.d_min:g}, {self.d_max:g}], coefficient {self.coeff:g}{own}{end}"


FILE_FORM = 'a JSON object such as {"1": [0.5, 1.0], "2": {"band": [1.0, 1.5], "coeff": 0.1}}'


def read_layers(path: Path) -> dict[int, LayerSettings]:
    """Reads --smar-band-file: each layer's settings, by its number from 1.

    Raises:
        ValueError: The file cannot be read, or does not have that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--smar-band-file {path} cannot be read ({error}); give {FILE_FORM}.") from error
    try:
        return {int(layer): _layer_settings(given) for layer, given in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--smar-band-file {path} is not {FILE_FORM} ({error}).") from error


def _layer_settings(given: Any) -> LayerSettings:
    settings = dict(given) if isinstance(given, dict) else {"band": given}
    band, coeff = settings.pop("band", None), settings.pop("coeff", None)
    if settings:
        raise KeyError(f"{next(iter(settings))!r} is neither band nor coeff")
    if band is not None:
        d_min, d_max = band
        band = (float(d_min), float(d_max))
    return LayerSettings(band, None if coeff is None else float(coeff))


class Smar(RoutingStrategy):
    """The band loss of one layer (Eq. 13 and 14)."""

    config: SmarConfig

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the SMAR loss; 0 where fewer than two modalities have tokens, and there is no distance."""
        value = band_loss(routing.distance, routing.comparable, *self.config.band(routing.number))
        return {SMAR_LOSS: AuxiliaryLoss(value, self.config.coefficient(routing.number, routing.iteration))}
