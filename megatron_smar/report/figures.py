# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, each a function from plain numbers to a matplotlib Figure, and their conversion to inline SVG.

Figures are plotted in the colours of a light page. `svg` replaces each colour of `PALETTE` by a CSS variable, so that
the same SVG works on light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, MaxNLocator, MultipleLocator, PercentFormatter

from megatron_smar.report.numbers import is_finite

LAYER_TAG = re.compile(r"moe/mrd_distance_layer_(\d+)$")
MAX_POINTS = 120
MAX_LAYER_LABELS = 8
RAMP_STEPS = 16

# Blue and orange (text and vision, as in the paper's Figure 1): Okabe and Ito's colours for colour-blind readers.
TEXT_COLOUR, VISION_COLOUR = "#0072b2", "#d97706"
INK, MUTED, GRID, BAND, PAGE = "#1b1f24", "#59616d", "#dfe2e7", "#cfe3da", "#ffffff"
# Heat maps are pixels and cannot use CSS variables: middle tones, which are visible on light and dark pages.
SHARE_HUE, TEXT_HUE, VISION_HUE = "#8459c4", "#2286c9", "#e0841a"


def _ramp(name: str, low: float, high: float) -> list[str]:
    return [to_hex(matplotlib.colormaps[name](x)) for x in np.linspace(low, high, RAMP_STEPS)]


# Layers are ordered, so their colours form a ramp; light and dark pages have ranges on which every line is visible.
LAYER_RAMP = _ramp("viridis", 0.0, 0.68)
# CSS variable -> colour on a light page, on a dark page.
PALETTE: dict[str, tuple[str, str]] = {
    "page": (PAGE, "#14171b"),
    "ink": (INK, "#e6e9ee"),
    "muted": (MUTED, "#a2abb8"),
    "grid": (GRID, "#343b46"),
    "band": (BAND, "#1f463a"),
    "text": (TEXT_COLOUR, "#56b4e9"),
    "vision": (VISION_COLOUR, "#f0a030"),
    **{f"layer-{i}": colours for i, colours in enumerate(zip(LAYER_RAMP, _ramp("viridis", 0.42, 0.98), strict=True))},
}
_STYLE: Any = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "image.composite_image": False,
    "savefig.dpi": 144,
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (6, 1.6, 1.2, 1.6)), (0, (1.4, 1.2)))


def _styled[**P](draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a function plot in the report's style, without changing the caller's matplotlib settings."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(width: float, height: float) -> Figure:
    """Creates a figure, with its size in points: as wide as a phone's screen, so that the text is legible there."""
    return Figure(figsize=(width / 72, height / 72))


def block_size(length: int) -> int:
    """Returns how many adjacent logged values are averaged into one plotted point."""
    return -(-length // MAX_POINTS)


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Averages blocks of adjacent values into at most `MAX_POINTS` points; a value that is not finite leaves a gap."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    starts = np.arange(0, len(x), max(1, block_size(len(x))))
    if not len(starts):
        return x, y
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def layer_series(
    history: Mapping[str, Any], pattern: re.Pattern[str] = LAYER_TAG
) -> dict[int, tuple[Sequence[float], Sequence[float]]]:
    """Returns a scalar by layer number, by default the MRD distance, from a history {tag: {"steps", "values"}}."""
    found = {int(match[1]): tag for tag in history if (match := pattern.match(tag))}
    return {layer: (history[found[layer]]["steps"], history[found[layer]]["values"]) for layer in sorted(found)}


def loss_names(history: Mapping[str, Any]) -> list[str]:
    """Returns the losses of a stage: tags that end in `loss` (without Megatron's `X vs samples` and `X validation`)."""
    return [tag for tag in history if tag.endswith("loss")]


@_styled
def mrd_over_training(history: Mapping[str, Any], band: Sequence[float] | None) -> Figure:
    """Plots the MRD distance of every MoE layer over the steps of a stage, with the band (Eq. 13) shaded, if any."""
    return _layers_over_training(layer_series(history), "MRD distance (nats)", band)


@_styled
def layers_over_training(history: Mapping[str, Any], pattern: re.Pattern[str], label: str) -> Figure:
    """Plots a scalar of every MoE layer over the steps.

    Args:
        history: Logged scalars, {tag: {"steps", "values"}}.
        pattern: Pattern of the scalar's tags; its first group is the layer's number.
        label: Label of the vertical axis.
    """
    return _layers_over_training(layer_series(history, pattern), label)


@_styled
def over_training(steps: Sequence[float], values: Sequence[float], label: str) -> Figure:
    """Plots one scalar over the steps."""
    figure = _figure(330, 180)
    axes = figure.subplots()
    axes.plot(*thin(steps, values), color=TEXT_COLOUR, linewidth=1.5)
    axes.set(xlabel="step", ylabel=label, ylim=(0, None))
    axes.margins(x=0.02)
    axes.grid(True, axis="y")
    return figure


def _layers_over_training(
    layers: Mapping[int, tuple[Sequence[float], Sequence[float]]], label: str, band: Sequence[float] | None = None
) -> Figure:
    figure = _figure(360, 250)
    axes = figure.subplots()
    ends = []
    dashes = _DASHES if len(layers) <= MAX_LAYER_LABELS else ("-",)
    labelled = set(_spread(sorted(layers), MAX_LAYER_LABELS))
    for index, (layer, (steps, values)) in enumerate(layers.items()):
        colour = LAYER_RAMP[round(index * (RAMP_STEPS - 1) / max(1, len(layers) - 1))]
        x, y = thin(steps, values)
        axes.plot(x, y, color=colour, linestyle=dashes[index % len(dashes)], linewidth=1.6)
        if layer in labelled:
            ends += _line_end(x, y, f"layer {layer}", colour)
    if band is not None:
        _band(axes, band, [value for _, values in layers.values() for value in values])
    axes.set(xlabel="step", ylabel=label)
    axes.margins(x=0)
    axes.grid(True, axis="y")
    _end_labels(axes, ends)
    return figure


@_styled
def mrd_by_layer(before: Sequence[float] | None, after: Sequence[float], band: Sequence[float] | None) -> Figure:
    """Plots the MRD distance by layer before and after training (the curves of the paper's Figures 2 and 3)."""
    figure = _figure(360, 250)
    axes = figure.subplots()
    layers = np.arange(1, len(after) + 1)
    ends = []
    for values, name, colour, marker in ((before, "before", MUTED, "o--"), (after, "after", TEXT_COLOUR, "o-")):
        if values is None:
            continue
        distances = np.asarray(values, dtype=float)
        axes.plot(layers, distances, marker, color=colour, linewidth=1.8, markersize=4.5)
        ends += _line_end(layers, distances, name, colour)
    if band is not None:
        _band(axes, band, [*(before or []), *after])
    axes.set(xlabel="MoE layer", ylabel="MRD distance (nats)", xlim=(0.5, len(layers) + 0.5))
    axes.xaxis.set_major_locator(_counting(len(layers)))
    axes.grid(True, axis="y")
    _end_labels(axes, ends)
    return figure


@_styled
def expert_heat_maps(before: Any | None, after: Any, top: float) -> Figure:
    """Plots the share of one modality's token slots per layer and expert, before and after (the paper's Figure 4).

    Args:
        before: Shares before training [L, E], nested lists or an array; rows sum to 1. None to plot only `after`.
        after: Shares after training [L, E].
        top: Share at the dark end of the scale, the same for both modalities.
    """
    ends = ("0%", f"{top / 2:.0%}", f"{top:.0%}")
    return _heat_maps(before, after, _fade(SHARE_HUE), (0, top), "share of this modality's token slots", ends)


@_styled
def preference_heat_maps(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Figure:
    """Plots the vision share minus the text share of every expert, before and after: which modality it prefers.

    Args:
        text: Shares of text tokens, {"before": [L, E], "after": [L, E]}; "before" may be left out of both arguments.
        vision: Shares of vision tokens, in the same form.
    """
    moments = {when: np.asarray(vision[when], float) - np.asarray(text[when], float) for when in text}
    before, after = moments.get("before"), moments["after"]
    top = top_share(*map(np.abs, moments.values()))
    colours = np.vstack([_fade(TEXT_HUE)[::-1], _fade(VISION_HUE)])
    ends = (f"text +{top:.0%}", "equal", f"vision +{top:.0%}")
    return _heat_maps(before, after, colours, (-top, top), "modality that uses the expert more", ends)


@_styled
def losses(history: Mapping[str, Any]) -> Figure:
    """Plots every loss of a stage over its steps in a separate panel, with validation losses as dots."""
    names = loss_names(history)
    figure = _figure(330, 50 + 130 * max(1, len(names)))
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
        axes.plot(
            *thin(history[name]["steps"], history[name]["values"]), color=TEXT_COLOUR, linewidth=1.5, label="training"
        )
        validation = history.get(f"{name} validation")
        if validation:
            axes.plot(
                validation["steps"], validation["values"], "o", color=VISION_COLOUR, markersize=4.5, label="validation"
            )
            axes.legend(loc="upper right")
        axes.set_ylabel(name)
        axes.margins(x=0.02)
        axes.grid(True, axis="y")
    axes.set_xlabel("step")
    return figure


@_styled
def accuracy_by_kind(kinds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plots the accuracy per kind of question as bars, best first, with a mark for the accuracy of guessing."""
    ordered = best_first(kinds)[::-1]
    accuracy = np.array([kinds[kind]["accuracy"] for kind in ordered], dtype=float)
    chance = np.array([kinds[kind]["chance"] for kind in ordered], dtype=float)
    figure = _figure(360, 80 + 28 * len(ordered))
    axes = figure.subplots()
    rows = np.arange(len(ordered))
    axes.barh(rows, accuracy, height=0.62, color=TEXT_COLOUR)
    # A light edge keeps the mark visible both on the bar and next to it.
    axes.plot(chance, rows, "D", color=VISION_COLOUR, markeredgecolor=PAGE, markersize=7, label="chance", clip_on=False)
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


@_styled
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
    figure = _figure(90 + 190 * columns, (70 + 17 * len(runs)) * lines + 20)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    rows = np.arange(len(runs))[::-1]
    for axes, (title, (values, before, form)) in zip(grid, panels.items(), strict=False):
        lengths = np.array([value if is_finite(value) else np.nan for value in values], dtype=float)
        axes.barh(rows, lengths, height=0.62, color=TEXT_COLOUR)
        for row, value in zip(rows, values, strict=True):
            place = value if is_finite(value) else 0
            axes.annotate(form(value), (place, row), (3, 0), textcoords="offset points", va="center", size=8.5)
        if is_finite(before):
            axes.axvline(before, color=VISION_COLOUR, linewidth=1.4, linestyle=_DASHES[1], label=start)
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


def svg(figure: Figure, name: str, label: str) -> str:
    """Converts a figure to an inline SVG element that takes its colours and fonts from the page.

    Args:
        figure: A figure from one of the functions above.
        name: Prefix of every id; unique on the page.
        label: Text for screen readers.
    """
    target = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(
            target, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    drawing = target.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    opening, drawing = drawing.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box, "matplotlib always writes a viewBox"
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{variable})")
    return f'<svg role="img" aria-label="{escape(label)}" {view_box[0]}>{drawing.strip()}'


def _band(axes: Axes, band: Sequence[float], values: Sequence[float]) -> None:
    """Shades and labels [d_min, d_max], and sets the axis limits to include it and the values."""
    d_min, d_max = band
    known = np.asarray(values, dtype=float)
    highest = max([d_max, *known[np.isfinite(known)]])
    axes.set_ylim(0, highest * 1.08)
    axes.axhspan(d_min, d_max, color=BAND, linewidth=0, zorder=0)
    name = f"shaded: band {d_min:g} to {d_max:g}"  # above the plot, where it covers no point
    axes.text(1, 1.01, name, transform=axes.transAxes, ha="right", va="bottom", color=MUTED, fontsize=9)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _line_end(x: np.ndarray, y: np.ndarray, name: str, colour: str) -> list[tuple[float, float, str, str]]:
    """Returns the last finite point of a line, for `_end_labels`."""
    finite = np.flatnonzero(np.isfinite(y))
    return [(float(x[finite[-1]]), float(y[finite[-1]]), name, colour)] if len(finite) else []


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels each line at its end; labels of lines that end close together are moved apart."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    gap = (high - low) / 17
    heights = [y for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    # Labels pushed past the top move down again.
    limit = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.045, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 1, "shrinkB": 1},
        )


def _fade(colour: str) -> np.ndarray:
    """Returns a colour map [128, 4] from transparent, which works on light and dark pages, to a colour."""
    # The power makes small shares distinguishable; the plotted colour bar shows it too.
    return np.column_stack([np.tile(to_rgb(colour), (128, 1)), np.linspace(0, 1, 128) ** 0.75])


def _heat_maps(
    before: Any | None,
    after: Any,
    colours: np.ndarray,
    limits: tuple[float, float],
    label: str,
    ends: tuple[str, ...],
) -> Figure:
    """Plots heat maps [L, E] side by side on one scale, with its colour bar below, labelled evenly with `ends`."""
    num_layers, num_experts = np.asarray(after).shape
    figure = _figure(330, 120 + float(np.clip(20 * num_layers, 80, 380)))
    maps = {"after": after} if before is None else {"before": before, "after": after}
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    edges = (0.5, num_experts + 0.5, num_layers + 0.5, 0.5)
    for axes, (title, share) in zip(panels, maps.items(), strict=True):
        shown = np.asarray(share, dtype=float)
        # "none" embeds one pixel per cell, whatever the number of experts.
        image = axes.imshow(
            shown,
            ListedColormap(colours),
            vmin=limits[0],
            vmax=limits[1],
            aspect="auto",
            interpolation="none",
            extent=edges,
        )
        axes.set(title=title if len(maps) > 1 else "", xlabel="expert")
        axes.spines[["top", "right"]].set_visible(True)
        axes.xaxis.set_major_locator(_counting(num_experts))
        axes.tick_params(length=2)
    panels[0].set_ylabel("MoE layer")
    panels[0].yaxis.set_major_locator(_counting(num_layers))
    scale = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.7, aspect=26, label=label)
    scale.set_ticks(list(np.linspace(*limits, len(ends))), labels=list(ends))
    scale.ax.tick_params(length=2)
    # As vector graphics, its 128 translucent steps would have visible seams.
    if scale.solids is not None:
        scale.solids.set_rasterized(True)
    return figure


def _counting(number: int) -> Locator:
    """Returns a locator with ticks at 1, 2, 3 ..., or fewer where there are more than 8."""
    return MultipleLocator(1) if number <= 8 else MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10])
