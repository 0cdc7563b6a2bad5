# SPDX-License-Identifier: Apache-2.0
"""The style of all figures: colors, fonts, bands and labels of lines; and their conversion to inline SVG and to files.

Figures are plotted in the colors of a light page. `svg` replaces each color of `PALETTE` by a CSS variable, so that
the same SVG works on light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, MaxNLocator, MultipleLocator

Values = Sequence[float] | np.ndarray

MAX_POINTS = 120
MAX_LAYER_LABELS = 8
RAMP_STEPS = 16

# Blue and orange (text and vision, as in the paper's Figure 1): Okabe and Ito's colors for color-blind readers.
TEXT_COLOR, VISION_COLOR = "#0072b2", "#d97706"
INK, MUTED, GRID, BAND, PAGE = "#1b1f24", "#59616d", "#dfe2e7", "#cfe3da", "#ffffff"
# Heat maps are pixels and cannot use CSS variables: middle tones, which are visible on light and dark pages.
SHARE_HUE, TEXT_HUE, VISION_HUE = "#8459c4", "#2286c9", "#e0841a"


def _ramp(name: str, low: float, high: float) -> list[str]:
    return [to_hex(matplotlib.colormaps[name](x)) for x in np.linspace(low, high, RAMP_STEPS)]


# Layers are ordered, so their colors form a ramp; light and dark pages have ranges on which every line is visible.
LAYER_RAMP = _ramp("viridis", 0.0, 0.68)
# Colors of runs that are compared, on a light and on a dark page; the first two are also those of text and vision.
RUN_COLORS = (
    (TEXT_COLOR, "#56b4e9"),
    (VISION_COLOR, "#f0a030"),
    ("#008060", "#2bc495"),
    ("#b0478f", "#de8fc4"),
    ("#5b4bb5", "#a99bf0"),
    ("#806600", "#dcc34a"),
    ("#a3341f", "#ef8b74"),
    ("#48515c", "#c3cad4"),
)
# CSS variable -> color on a light page, on a dark page.
PALETTE: dict[str, tuple[str, str]] = {
    "page": (PAGE, "#14171b"),
    "ink": (INK, "#e6e9ee"),
    "muted": (MUTED, "#a2abb8"),
    "grid": (GRID, "#343b46"),
    "band": (BAND, "#1f463a"),
    "text": (TEXT_COLOR, "#56b4e9"),
    "vision": (VISION_COLOR, "#f0a030"),
    **{f"run-{i}": colors for i, colors in enumerate(RUN_COLORS) if i > 1},
    **{f"layer-{i}": colors for i, colors in enumerate(zip(LAYER_RAMP, _ramp("viridis", 0.42, 0.98), strict=True))},
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
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (6, 1.6, 1.2, 1.6)), (0, (1.4, 1.2)))


def styled[**P](draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a function plot in the report's style, without changing the caller's matplotlib settings."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> Figure:
    """Creates a figure, with its size in points: as wide as a phone's screen, so that the text is legible there."""
    return Figure(figsize=(width / 72, height / 72))


def block_size(length: int) -> int:
    """Returns how many adjacent logged values are averaged into one plotted point."""
    return -(-length // MAX_POINTS)


def thin(steps: Values, values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Averages blocks of adjacent values into at most `MAX_POINTS` points; a value that is not finite leaves a gap."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    starts = np.arange(0, len(x), max(1, block_size(len(x))))
    if not len(starts):
        return x, y
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def svg(figure: Figure, name: str, label: str) -> str:
    """Converts a figure to an inline SVG element that takes its colors and fonts from the page.

    Args:
        figure: A figure in the report's style.
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
    drawing = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", drawing)  # equal images have equal ids
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{variable})")
    return f'<svg role="img" aria-label="{escape(label)}" {view_box[0]}>{drawing.strip()}'


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG and SVG on a white page; returns the files' paths.

    Args:
        figure: A figure in the report's style.
        stem: Path of the files without their suffix.
    """
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        write(figure, path)
    return paths


def write(figure: Figure, path: Path) -> None:
    """Writes a figure on a white page; an SVG is the same whenever it is written.

    Args:
        figure: A figure in the report's style.
        path: The file, a PNG or an SVG.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": path.stem}):
        figure.savefig(path, facecolor=PAGE, metadata={"Date": None} if path.suffix == ".svg" else None)


def shade_band(axes: Axes, band: Sequence[float], values: Sequence[float]) -> None:
    """Shades and labels [d_min, d_max], and sets the axis limits to include it and the values."""
    d_min, d_max = band
    known = np.asarray(values, dtype=float)
    highest = max([d_max, *known[np.isfinite(known)]])
    axes.set_ylim(0, highest * 1.08)
    axes.axhspan(d_min, d_max, color=BAND, linewidth=0, zorder=0)
    name = f"shaded: band {d_min:g} to {d_max:g}"  # above the plot, where it covers no point
    axes.text(1, 1.01, name, transform=axes.transAxes, ha="right", va="bottom", color=MUTED, fontsize=9)


def spread(items: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def line_end(x: np.ndarray, y: np.ndarray, name: str, color: str) -> list[tuple[float, float, str, str]]:
    """Returns the last finite point of a line, for `label_ends`."""
    finite = np.flatnonzero(np.isfinite(y))
    return [(float(x[finite[-1]]), float(y[finite[-1]]), name, color)] if len(finite) else []


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], rows: int = 17) -> None:
    """Labels each line at its end, or points; labels that would lie close together are moved apart.

    Args:
        axes: The axes, with their final limits.
        ends: x, y, label and color of each.
        rows: How many labels fit above each other.
    """
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    gap = (high - low) / rows
    heights = [y for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    # Labels pushed past the top move down again.
    limit = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (x, y, text, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.045, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 1, "shrinkA": 1, "shrinkB": 1},
        )


def fade(color: str) -> np.ndarray:
    """Returns a color map [128, 4] from transparent, which works on light and dark pages, to a color."""
    # The power makes small shares distinguishable; the plotted color bar shows it too.
    return np.column_stack([np.tile(to_rgb(color), (128, 1)), np.linspace(0, 1, 128) ** 0.75])


def counting(number: int) -> Locator:
    """Returns a locator with ticks at 1, 2, 3 ..., or fewer where there are more than 8."""
    return MultipleLocator(1) if number <= 8 else MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10])
