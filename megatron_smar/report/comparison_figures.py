# SPDX-License-Identifier: Apache-2.0
"""Figures of several runs: panels with one curve per run, over the layers or over the steps of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_smar.report.style import BAND, DASHES, RUN_COLORS, Values, counting, new_figure, styled, thin

MAX_COLUMNS = 3
MARKERS = "osD^"

Band = tuple[float, float]
Place = Literal["outside upper left", "outside lower left"]


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: Title of the panel.
        label: Label of the vertical axis.
        curves: Positions on the horizontal axis and values, by name of the run.
    """

    title: str
    label: str
    curves: Mapping[str, tuple[Values, Values]]


@styled
def distance_panels(runs: Sequence[str], panels: Sequence[Panel], bands: Mapping[str, Band]) -> Figure:
    """Plots the MRD distance by layer (the paper's Figures 2, 3 and 5).

    Args:
        runs: Names of all runs of the comparison, which choose the colors.
        panels: A panel for each set of questions; the curves are over the number of the layer.
        bands: The band of each run that has one; it is shaded.
    """
    figure, grid = _grid(panels, sharey=True)
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        shown = panel if number % MAX_COLUMNS == 0 else panel._replace(label="")
        _curves(axes, runs, shown, "MoE layer", MARKERS)
        last = max(max(layers) for layers, _ in panel.curves.values())
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(counting(int(last)))
    shaded = _shade(grid, runs, bands)
    axes.set_ylim(bottom=0)
    _legend(figure, _lines(grid, runs))
    _legend(figure, shaded, "outside lower left")
    return figure


@styled
def training_panels(runs: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Plots scalars over the steps of the training.

    Args:
        runs: Names of all runs of the comparison, which choose the colors.
        panels: A panel for each scalar; the curves are over the step.
    """
    figure, grid = _grid(panels)
    for axes, panel in zip(grid, panels, strict=True):
        thinned = {run: thin(*curve) for run, curve in panel.curves.items()}
        _curves(axes, runs, panel._replace(curves=thinned), "step")
        axes.margins(x=0.02)
    _legend(figure, _lines(grid, runs))
    return figure


def _grid(panels: Sequence[Panel], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    columns = min(MAX_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(90 + 270 * columns, 50 + 210 * lines)
    grid = list(figure.subplots(lines, columns, sharey=sharey, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure, grid[: len(panels)]


def _curves(axes: Axes, runs: Sequence[str], panel: Panel, label: str, markers: str = "") -> None:
    for run, (x, y) in panel.curves.items():
        number = list(runs).index(run)
        cycle = number // len(RUN_COLORS) % len(DASHES)  # beyond the colors, lines and markers change
        axes.plot(
            np.asarray(x, dtype=float),
            np.asarray(y, dtype=float),
            marker=markers[cycle] if markers else "",
            markersize=4,
            linewidth=1.6,
            color=_color(number),
            linestyle=DASHES[cycle],
            label=run,
        )
    axes.set(title=panel.title, xlabel=label, ylabel=panel.label)
    axes.grid(True, axis="y")


def _color(number: int) -> str:
    return RUN_COLORS[number % len(RUN_COLORS)][0]


def _shade(grid: Sequence[Axes], runs: Sequence[str], bands: Mapping[str, Band]) -> list[tuple[Any, str]]:
    """Shades each band once, in its first run's color where there are several; returns the entries of the legend."""
    entries = []
    distinct = list(dict.fromkeys(bands.values()))
    for band in distinct:
        named = [run for run in runs if bands.get(run) == band]
        color, alpha = (BAND, 1.0) if len(distinct) == 1 else (_color(list(runs).index(named[0])), 0.18)
        for axes in grid:
            axes.axhspan(*band, color=color, alpha=alpha, linewidth=0, zorder=0)
        of = "" if len(named) == len(runs) else f" ({', '.join(named)})"
        entries.append((Patch(color=color, alpha=alpha, linewidth=0), f"band {band[0]:g} to {band[1]:g}{of}"))
    return entries


def _lines(grid: Sequence[Axes], runs: Sequence[str]) -> list[tuple[Any, str]]:
    found = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    return [(found[run], run) for run in runs if run in found]


def _legend(figure: Figure, entries: Sequence[tuple[Any, str]], place: Place = "outside upper left") -> None:
    """Adds a legend for all panels above or below them; the figure grows by the lines of the legend after its first."""
    if not entries:
        return
    width, height = figure.get_size_inches() * 72
    # matplotlib leaves out labels that begin with an underscore.
    labels = [fill(f" {label}" if label.startswith("_") else label, int(width / 7)) for _, label in entries]
    columns = max(1, min(len(labels), int(width / (50 + 6 * max(map(len, labels))))))
    lines = -(-len(labels) // columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight((height + 16 * (lines - 1)) / 72)
    figure.legend([handle for handle, _ in entries], labels, loc=place, ncols=columns)
