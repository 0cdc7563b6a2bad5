# SPDX-License-Identifier: Apache-2.0
"""From an image file to the tiles that the vision encoder receives, by InternVL's dynamic tiling.

The rule is that of InternVL 1.5 (https://arxiv.org/abs/2404.16821; VITA's is the same), as published in its
`dynamic_preprocess` and in transformers' `GotOcr2ImageProcessor`, which transformers uses for InternVL. The two agree
on every size, ties included, although `dynamic_preprocess` orders equally large grids as a Python set does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_smar.data.images import read_image


@dataclass(frozen=True)
class ImageConfig:
    """How images are split into tiles.

    Attributes:
        image_size: Side length of a tile in pixels (`--image-size`).
        min_tiles: Minimum number of tiles of an image (`--min-tiles`), without the thumbnail.
        max_tiles: Maximum number of tiles of an image (`--max-tiles`), without the thumbnail.
        use_thumbnail: Whether the full image is added as the last tile if there are several (`--use-thumbnail`).
    """

    image_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 1
    use_thumbnail: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.image_size < 1:
            raise ValueError(f"--image-size {self.image_size} is not a number of pixels: give one above 0.")
        if self.min_tiles < 1:
            raise ValueError(f"--min-tiles {self.min_tiles} leaves an image without tiles: give 1 or more.")
        if self.max_tiles < self.min_tiles:
            raise ValueError(
                f"--max-tiles {self.max_tiles} is less than --min-tiles {self.min_tiles}: "
                "raise the former or lower the latter."
            )
        if self.use_thumbnail and self.max_tiles == 1:
            raise ValueError(
                "--use-thumbnail adds a tile to several, but --max-tiles 1 allows only one: "
                "give --max-tiles 12, as VITA does, or leave --use-thumbnail out."
            )


class ImageProcessor:
    """Converts image files to tiles.

    Args:
        config: Size and number of the tiles.
    """

    def __init__(self, config: ImageConfig) -> None:
        self.config = config

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Returns (columns, rows) of the grid of tiles for an image of that size."""
        config = self.config
        return tile_grid(width, height, config.min_tiles, config.max_tiles, config.image_size)

    def count_tiles(self, width: int, height: int) -> int:
        """Returns the number of tiles, thumbnail included, of an image of that displayed size, without its pixels."""
        columns, rows = self.grid(width, height)
        return columns * rows + (1 if self.config.use_thumbnail and columns * rows > 1 else 0)

    def empty(self) -> torch.Tensor:
        """Returns an empty tensor of tiles, [0, 3, H, W] uint8."""
        return torch.empty(0, self.config.image_size, self.config.image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

    def __call__(self, data: bytes) -> torch.Tensor:
        """Decodes an image file and splits it into tiles.

        Returns:
            [tiles, 3, H, W] uint8, row by row from the upper left, the thumbnail last; the vision encoder normalizes.
            In memory the colors of a pixel are together (torch's channels_last), as decoders and resizing have them.

        Raises:
            SampleError: `bad_image`, `image_too_large`.
        """
        pixels = read_image(data)
        height, width = pixels.shape[:2]
        columns, rows = self.grid(width, height)
        side, in_grid = self.config.image_size, columns * rows
        tiles = torch.empty(self.count_tiles(width, height), side, side, 3, dtype=torch.uint8)
        canvas = _resize(pixels, columns * side, rows * side).view(rows, side, columns, side, 3)
        tiles[:in_grid].view(rows, columns, side, side, 3).copy_(canvas.transpose(1, 2))
        if len(tiles) > in_grid:
            tiles[in_grid] = _resize(pixels, side, side)
        return tiles.permute(0, 3, 1, 2)


def join_tiles(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates tiles, each [n, 3, H, W], in the memory format of `ImageProcessor`."""
    return torch.cat([some.permute(0, 2, 3, 1) for some in tiles]).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=2**16)
def tile_grid(width: int, height: int, min_tiles: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """Returns (columns, rows) of the grid whose aspect ratio is closest to the image's.

    Among equally close grids, the largest grid of which the image has more than half the pixels is chosen; if there is
    none, the smallest grid.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        min_tiles: Minimum number of tiles.
        max_tiles: Maximum number of tiles.
        image_size: Side length of a tile in pixels.
    """
    grids = _grids(min_tiles, max_tiles)
    # Floats, as in the published rule: exact fractions would give ties that the rule does not have.
    distances = [abs(width / height - columns / rows) for columns, rows in grids]
    closest = [grid for grid, distance in zip(grids, distances, strict=True) if distance == min(distances)]
    filled = [(columns, rows) for columns, rows in closest if 2 * width * height > columns * rows * image_size**2]
    return filled[-1] if filled else closest[0]


@functools.lru_cache
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """Returns all grids with `min_tiles` to `max_tiles` tiles, the smallest first."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _resize(pixels: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Resizes an image, [h, w, 3] uint8 -> [height, width, 3] uint8, bicubic with antialiasing.

    torch's kernel for uint8 is several times faster than Pillow's. The results agree within two levels, except where
    Pillow resizes vertically first (some portrait images) and clips overshoot in between. transformers' image
    processors use the same kernel, through torchvision.
    """
    # A batch dimension in front, before the permutation: with another stride the kernel separates the colors first.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0]
