# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, each a function from plain numbers to a matplotlib Figure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_smar.report.numbers import is_finite
from megatron_smar.report.style import (
    DASHES,
    LAYER_RAMP,
    MAX_LAYER_LABELS,
    MUTED,
    PAGE,
    RAMP_STEPS,
    SHARE_HUE,
    TEXT_COLOR,
    TEXT_HUE,
    VISION_COLOR,
    VISION_HUE,
    counting,
    fade,
    label_ends,
    line_end,
    new_figure,
    shade_band,
    spread,
    styled,
    thin,
)

LAYER_TAG = re.compile(r"moe/mrd_distance_layer_(\d+)$")


class HeatMap(NamedTuple):
    """One heat map.

    Attributes:
        values: The values, [L, E].
        title: Title of the map.
        label: Label of the horizontal axis.
        place: Where the title is; "left" leaves room for a long one.
    """

    values: Any
    title: str = ""
    label: str = "expert"
    place: Literal["left", "center"] = "center"


def layer_series(
    history: Mapping[str, Any], pattern: re.Pattern[str] = LAYER_TAG
) -> dict[int, tuple[Sequence[float], Sequence[float]]]:
    """Returns a scalar by layer number, by default the MRD distance, from a history {tag: {"steps", "values"}}."""
    found = {int(match[1]): tag for tag in history if (match := pattern.match(tag))}
    return {layer: (history[found[layer]]["steps"], history[found[layer]]["values"]) for layer in sorted(found)}


def loss_names(history: Mapping[str, Any]) -> list[str]:
    """Returns the losses of a stage: tags that end in `loss` (without Megatron's `X vs samples` and `X validation`)."""
    return [tag for tag in history if tag.endswith("loss")]


@styled
def mrd_over_training(history: Mapping[str, Any], band: Sequence[float] | None) -> Figure:
    """Plots the MRD distance of every MoE layer over the steps of a stage, with the band (Eq. 13) shaded, if any."""
    return _layers_over_training(layer_series(history), "MRD distance (nats)", band)


@styled
def layers_over_training(history: Mapping[str, Any], pattern: re.Pattern[str], label: str) -> Figure:
    """Plots a scalar of every MoE layer over the steps.

    Args:
        history: Logged scalars, {tag: {"steps", "values"}}.
        pattern: Pattern of the scalar's tags; its first group is the layer's number.
        label: Label of the vertical axis.
    """
    return _layers_over_training(layer_series(history, pattern), label)


@styled
def over_training(steps: Sequence[float], values: Sequence[float], label: str) -> Figure:
    """Plots one scalar over the steps."""
    figure = new_figure(330, 180)
    axes = figure.subplots()
    axes.plot(*thin(steps, values), color=TEXT_COLOR, linewidth=1.5)
    axes.set(xlabel="step", ylabel=label, ylim=(0, None))
    axes.margins(x=0.02)
    axes.grid(True, axis="y")
    return figure


def _layers_over_training(
    layers: Mapping[int, tuple[Sequence[float], Sequence[float]]], label: str, band: Sequence[float] | None = None
) -> Figure:
    figure = new_figure(360, 250)
    axes = figure.subplots()
    ends = []
    dashes = DASHES if len(layers) <= MAX_LAYER_LABELS else ("-",)
    labeled = set(spread(sorted(layers), MAX_LAYER_LABELS))
    for index, (layer, (steps, values)) in enumerate(layers.items()):
        color = LAYER_RAMP[round(index * (RAMP_STEPS - 1) / max(1, len(layers) - 1))]
        x, y = thin(steps, values)
        axes.plot(x, y, color=color, linestyle=dashes[index % len(dashes)], linewidth=1.6)
        if layer in labeled:
            ends += line_end(x, y, f"layer {layer}", color)
    if band is not None:
        shade_band(axes, band, [value for _, values in layers.values() for value in values])
    axes.set(xlabel="step", ylabel=label)
    axes.margins(x=0)
    axes.grid(True, axis="y")
    label_ends(axes, ends)
    return figure


@styled
def mrd_by_layer(before: Sequence[float] | None, after: Sequence[float], band: Sequence[float] | None) -> Figure:
    """Plots the MRD distance by layer before and after training (the curves of the paper's Figures 2 and 3)."""
    figure = new_figure(360, 250)
    axes = figure.subplots()
    layers = np.arange(1, len(after) + 1)
    ends = []
    for values, name, color, marker in ((before, "before", MUTED, "o--"), (after, "after", TEXT_COLOR, "o-")):
        if values is None:
            continue
        distances = np.asarray(values, dtype=float)
        axes.plot(layers, distances, marker, color=color, linewidth=1.8, markersize=4.5)
        ends += line_end(layers, distances, name, color)
    if band is not None:
        shade_band(axes, band, [*(before or []), *after])
    axes.set(xlabel="MoE layer", ylabel="MRD distance (nats)", xlim=(0.5, len(layers) + 0.5))
    axes.xaxis.set_major_locator(counting(len(layers)))
    axes.grid(True, axis="y")
    label_ends(axes, ends)
    return figure


@styled
def expert_heat_maps(before: Any | None, after: Any, top: float) -> Figure:
    """Plots the share of one modality's token slots per layer and expert, before and after (the paper's Figure 4).

    Args:
        before: Shares before training [L, E], nested lists or an array; rows sum to 1. None to plot only `after`.
        after: Shares after training [L, E].
        top: Share at the dark end of the scale, the same for both modalities.
    """
    return _share_maps(_pair(before, after), top, "share of this modality's token slots")


@styled
def expert_maps_by_run(runs: Mapping[str, Mapping[str, Any]], top: float) -> Figure:
    """Plots the share of each modality's token slots per layer and expert (the paper's Figure 4), one row per run.

    Args:
        runs: By name of the run: {modality: [L, E]}. Runs may have different shapes and modalities.
        top: Share at the dark end of the scale.
    """
    kinds = list(dict.fromkeys(kind for shares in runs.values() for kind in shares))
    rows = [
        [
            HeatMap(shares[kind], name if kind == next(iter(shares)) else "", f"expert ({kind} tokens)", "left")
            if kind in shares
            else None
            for kind in kinds
        ]
        for name, shares in runs.items()
    ]
    return _share_maps(rows, top, "share of the modality's token slots")


def _share_maps(rows: Sequence[Sequence[HeatMap | None]], top: float, label: str) -> Figure:
    return _heat_maps(rows, fade(SHARE_HUE), (0, top), label, ("0%", f"{top / 2:.0%}", f"{top:.0%}"))


@styled
def preference_heat_maps(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Figure:
    """Plots the vision share minus the text share of every expert, before and after: which modality it prefers.

    Args:
        text: Shares of text tokens, {"before": [L, E], "after": [L, E]}; "before" may be left out of both arguments.
        vision: Shares of vision tokens, in the same form.
    """
    moments = {when: np.asarray(vision[when], float) - np.asarray(text[when], float) for when in text}
    before, after = moments.get("before"), moments["after"]
    top = top_share(*map(np.abs, moments.values()))
    colors = np.vstack([fade(TEXT_HUE)[::-1], fade(VISION_HUE)])
    ends = (f"text +{top:.0%}", "equal", f"vision +{top:.0%}")
    return _heat_maps(_pair(before, after), colors, (-top, top), "modality that uses the expert more", ends)


@styled
def losses(history: Mapping[str, Any]) -> Figure:
    """Plots every loss of a stage over its steps in a separate panel, with validation losses as dots."""
    names = loss_names(history)
    figure = new_figure(330, 50 + 130 * max(1, len(names)))
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
        axes.plot(
            *thin(history[name]["steps"], history[name]["values"]), color=TEXT_COLOR, linewidth=1.5, label="training"
        )
        validation = history.get(f"{name} validation")
        if validation:
            axes.plot(
                validation["steps"], validation["values"], "o", color=VISION_COLOR, markersize=4.5, label="validation"
            )
            axes.legend(loc="upper right")
        axes.set_ylabel(name)
        axes.margins(x=0.02)
        axes.grid(True, axis="y")
    axes.set_xlabel("step")
    return figure


@styled
def accuracy_by_kind(kinds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plots the accuracy per kind of question as bars, best first, with a mark for the accuracy of guessing."""
    ordered = best_first(kinds)[::-1]
    accuracy = np.array([kinds[kind]["accuracy"] for kind in ordered], dtype=float)
    chance = np.array([kinds[kind]["chance"] for kind in ordered], dtype=float)
    figure = new_figure(360, 80 + 28 * len(ordered))
    axes = figure.subplots()
    rows = np.arange(len(ordered))
    axes.barh(rows, accuracy, height=0.62, color=TEXT_COLOR)
    # A light edge keeps the mark visible both on the bar and next to it.
    axes.plot(chance, rows, "D", color=VISION_COLOR, markeredgecolor=PAGE, markersize=7, label="chance", clip_on=False)
    for row, value in enumerate(accuracy):
        axes.annotate(f"{value:.0%}" if np.isfinite(value) else "–", (1.015, row), va="center", annotation_clip=False)
    axes.set_yticks(rows, [f"{kind}  (n = {kinds[kind]['count']:,})" for kind in ordered])
    axes.set(xlim=(0, 1), xlabel="answered correctly")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    figure.legend(loc="outside upper center")
    return figure


@styled
def bars_by_run(
    runs: Sequence[str],
    panels: Mapping[str, tuple[Sequence[float | None], float | None, Callable[[float | None], str]]],
    start: str,
) -> Figure:
    """Plots several measures of several runs, a panel for each measure and a bar for each run.

    Args:
        runs: Names of the runs.
        panels: By title: the measure of each run, that of the start of all runs, which is drawn as a line (None: there
            is none), and the format of a value.
        start: Name of the start.
    """
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(90 + 190 * columns, (70 + 17 * len(runs)) * lines + 20)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    rows = np.arange(len(runs))[::-1]
    for axes, (title, (values, before, form)) in zip(grid, panels.items(), strict=False):
        lengths = np.array([value if is_finite(value) else np.nan for value in values], dtype=float)
        axes.barh(rows, lengths, height=0.62, color=TEXT_COLOR)
        for row, value in zip(rows, values, strict=True):
            place = value if is_finite(value) else 0
            axes.annotate(form(value), (place, row), (3, 0), textcoords="offset points", va="center", size=8.5)
        if is_finite(before):
            axes.axvline(before, color=VISION_COLOR, linewidth=1.4, linestyle=DASHES[1], label=start)
        axes.set_title(title)
        axes.set_yticks(rows, runs)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.grid(True, axis="x")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = next((axes.get_legend_handles_labels() for axes in grid if axes.get_legend_handles_labels()[0]), None)
    if handles:
        figure.legend(*handles, loc="outside upper right")
    return figure


def top_share(*shares: Any) -> float:
    """Returns the upper end of a scale for all these shares; the end and its half are round numbers."""
    known = np.concatenate([np.ravel(np.asarray(share, dtype=float)) for share in shares])
    largest = known[np.isfinite(known)].max(initial=0)
    ends = (0.02, 0.04, 0.06, 0.08, *(tenths / 10 for tenths in range(1, 10)))
    return next((end for end in ends if largest <= end), 1.0)


def best_first(kinds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the kinds of questions by descending accuracy, with unmeasured kinds last."""
    return sorted(kinds, key=lambda kind: -kinds[kind]["accuracy"] if is_finite(kinds[kind]["accuracy"]) else 1)


def _pair(before: Any | None, after: Any) -> list[list[HeatMap | None]]:
    """Returns the row of heat maps before and after; without titles if there is only one."""
    return [[HeatMap(after)] if before is None else [HeatMap(before, "before"), HeatMap(after, "after")]]


def _heat_maps(
    rows: Sequence[Sequence[HeatMap | None]],
    colors: np.ndarray,
    limits: tuple[float, float],
    label: str,
    ends: tuple[str, ...],
) -> Figure:
    """Plots rows of heat maps on one scale, with its color bar below, labeled evenly with `ends`; None: no map."""
    per_layer, most = (20, 380) if len(rows) == 1 else (10, 200)
    layers = [max(len(part.values) for part in row if part) for row in rows]
    heights = [50 + float(np.clip(per_layer * count, 80, most)) for count in layers]
    figure = new_figure(330, 70 + sum(heights))
    grid = figure.subplots(len(rows), len(rows[0]), sharey="row", squeeze=False, height_ratios=heights)
    for panels, row in zip(grid, rows, strict=True):
        for axes, part in zip(panels, row, strict=True):
            if part is None:
                axes.set_axis_off()
            else:
                image = _heat_map(axes, part, ListedColormap(colors), limits)
        panels[0].set_ylabel("MoE layer")
    scale = figure.colorbar(image, ax=list(grid.flat), location="bottom", shrink=0.7, aspect=26, label=label)
    scale.set_ticks(list(np.linspace(*limits, len(ends))), labels=list(ends))
    scale.ax.tick_params(length=2)
    # As vector graphics, its 128 translucent steps would have visible seams.
    if scale.solids is not None:
        scale.solids.set_rasterized(True)
    return figure


def _heat_map(axes: Axes, part: HeatMap, colors: ListedColormap, limits: tuple[float, float]) -> Any:
    values = np.asarray(part.values, dtype=float)
    num_layers, num_experts = values.shape
    edges = (0.5, num_experts + 0.5, num_layers + 0.5, 0.5)
    low, high = limits
    # "none" embeds one pixel per cell, whatever the number of experts.
    image = axes.imshow(values, colors, vmin=low, vmax=high, aspect="auto", interpolation="none", extent=edges)
    axes.set_title(part.title, loc=part.place)
    axes.set_xlabel(part.label)
    axes.spines[["top", "right"]].set_visible(True)
    axes.xaxis.set_major_locator(counting(num_experts))
    axes.yaxis.set_major_locator(counting(num_layers))
    axes.tick_params(length=2)
    return image
