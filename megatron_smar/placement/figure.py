# SPDX-License-Identifier: Apache-2.0
"""The figure of a placement's report: crossing, and bytes of a DeepEP-like dispatch, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_smar.placement.report import AFTER, BEFORE

_COLORS = {BEFORE: "#9aa3ad", AFTER: "#0072b2"}
_LINES = (("--", "chance"), (":", "floor"))
_PANELS = {
    "crossing": "tokens whose experts are on several devices",
    "bytes_per_device": "bytes that leave, one copy per device",
}


def draw(content: Mapping[str, Any]) -> Figure:
    """Returns the figure: a row of panels, and in each a pair of bars for each number of devices and kind of tokens."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        _panel(axes, content["devices"], name)
        axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[1].set_ylabel("bytes per token and layer")
    return figure


def _panel(axes: Axes, devices: Mapping[str, Any], name: str) -> None:
    rows = [(number, scope) for number, values in devices.items() for scope in values[BEFORE]]
    places = np.arange(len(rows))
    for offset, when in ((-0.2, BEFORE), (0.2, AFTER)):
        heights = [devices[number][when][scope][name] for number, scope in rows]
        axes.bar(places + offset, heights, width=0.4, color=_COLORS[when], label=when)
    for style, line in _LINES:
        heights = [devices[number][line][name] for number, _ in rows]
        for place, height in zip(places, heights, strict=True):
            axes.plot([place - 0.45, place + 0.45], [height, height], style, color="#1b1f24", linewidth=1.2)
        axes.plot([], [], style, color="#1b1f24", linewidth=1.2, label=line)
    axes.set_xticks(places, [f"{scope}\n{number}" for number, scope in rows], fontsize=8)
    axes.set_xlabel("tokens, and number of devices")
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(path: Path, content: Mapping[str, Any]) -> None:
    """Draws the figure into a file, of the format that the file's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(content).savefig(path, dpi=144)
