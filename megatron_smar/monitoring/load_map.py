# SPDX-License-Identifier: Apache-2.0
"""The experts' load as a heat map with axes and a color scale, like the paper's Figure 4, during a run."""

from __future__ import annotations

from functools import cache

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

# Margins around the map in pixels; the color scale is on the right.
LEFT, TOP, RIGHT, BOTTOM = 64, 36, 130, 52
_DPI = 100
_COLORS = colormaps["viridis"]
# Most shares are small, so that a linear scale would show an almost uniformly dark map.
_SCALE = PowerNorm(0.5, 0.0, 1.0)
_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)


class LoadMap:
    """Draws heat maps of one size. Axes, labels and color scale are drawn only once, which takes 0.1 s.

    Args:
        layers: L, the number of layers: rows, from the top.
        experts: E, the number of experts: columns.
        title: Title above the map.

    Attributes:
        figure: The matplotlib figure with everything but the cells.
        cell: Height and width of a cell in pixels.
    """

    def __init__(self, layers: int, experts: int, title: str) -> None:
        self.cell = (int(np.clip(320 // layers, 4, 40)), int(np.clip(480 // experts, 2, 40)))
        # Title, axis labels and color scale need at least this much room, even with few cells.
        self._size = (layers * self.cell[0], experts * self.cell[1])
        width, height = LEFT + max(self._size[1], 160) + RIGHT, TOP + max(self._size[0], 160) + BOTTOM
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas = FigureCanvasAgg(self.figure)

        def place(left: int, wide: int, high: int) -> tuple[float, float, float, float]:
            return left / width, 1 - (TOP + high) / height, wide / width, high / height

        axes = self.figure.add_axes(place(LEFT, self._size[1], self._size[0]))
        axes.set(
            xlim=(-0.5, experts - 0.5), ylim=(layers + 0.5, 0.5), xlabel="expert (from 0)", ylabel="layer (from 1)"
        )
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axes.set_title(title, loc="left", fontsize=10)
        scale = self.figure.add_axes(place(width - RIGHT + 20, 14, height - TOP - BOTTOM))
        bar = self.figure.colorbar(ScalarMappable(_SCALE, _COLORS), cax=scale, ticks=list(_TICKS))
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.set_label("share of tokens")
        canvas.draw()
        self._frame = np.array(canvas.buffer_rgba())[..., :3]

    def draw(self, shares: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Draws the heat map and returns the image, [height, width, 3].

        Args:
            shares: Share of the tokens that choose each expert, [L, E].
        """
        picture = self._frame.copy()
        cells = np.asarray(_COLORS(_SCALE(shares), bytes=True))[..., :3]
        rows, columns = self._size
        picture[TOP : TOP + rows, LEFT : LEFT + columns] = cells.repeat(self.cell[0], 0).repeat(self.cell[1], 1)
        return picture


@cache
def load_map(layers: int, experts: int, title: str) -> LoadMap:
    """Returns the map of the given size and title, created at its first use."""
    return LoadMap(layers, experts, title)
