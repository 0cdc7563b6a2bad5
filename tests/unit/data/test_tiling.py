# SPDX-License-Identifier: Apache-2.0
"""Images to tiles: the grid equals InternVL's, the pixels equal those of transformers' image processors."""

import io
import itertools
from fractions import Fraction

import matplotlib.cbook
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import image_utils
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor, get_optimal_tiled_canvas

from megatron_smar.data.images import read_image, read_size
from megatron_smar.data.tiling import ImageConfig, ImageProcessor, tile_grid
from megatron_smar.model.vision import normalize

from .conftest import picture

MEAN, STD = tuple(image_utils.IMAGENET_DEFAULT_MEAN), tuple(image_utils.IMAGENET_DEFAULT_STD)
SIDES = [1, 2, 3, 100, 223, 224, 225, 317, 336, 447, 448, 449, 480, 640, 672, 768, 896, 1000, 1024, 1344, 1920, 4000]


def photo(size: tuple[int, int]) -> Image.Image:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB").resize(size, Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    image.save(stream := io.BytesIO(), format="PNG", compress_level=1)
    return stream.getvalue()


def transformers_grid(width: int, height: int, fewest: int, most: int, side: int = 448) -> tuple[int, int]:
    return get_optimal_tiled_canvas.__wrapped__((height, width), (side, side), fewest, most)


# ---- the grid


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    limits=st.tuples(st.integers(1, 24), st.integers(1, 24)).map(sorted),
    side=st.sampled_from([16, 224, 336, 384, 448, 512]),
)
@example(500, 800, [1, 12], 448)  # as close to 1 x 4 as to 2 x 2, which have the same number of tiles
@example(10000, 1, [1, 12], 448)
def test_the_grid_equals_that_of_transformers(width: int, height: int, limits: list[int], side: int) -> None:
    assert tile_grid(width, height, *limits, side) == transformers_grid(width, height, *limits, side)


@pytest.mark.parametrize(("fewest", "most"), [(1, 1), (1, 6), (1, 12), (4, 12)])
def test_the_grid_equals_that_of_transformers_over_a_sweep_of_sizes(fewest: int, most: int) -> None:
    for width, height in itertools.product(SIDES, SIDES):
        assert tile_grid(width, height, fewest, most, 448) == transformers_grid(width, height, fewest, most), (
            width,
            height,
        )


def test_ties_between_grids_are_broken_as_in_transformers() -> None:
    sides = range(1, 13)
    shapes = [Fraction(c, r) for c, r in itertools.product(sides, sides) if c * r <= 12]
    between = {(one + other) / 2 for one, other in itertools.product(shapes, shapes)}
    for shape, scale in itertools.product(between, (1, 3, 40, 200, 448, 1000)):
        width, height = shape.numerator * scale, shape.denominator * scale
        assert tile_grid(width, height, 1, 12, 448) == transformers_grid(width, height, 1, 12), (width, height)


@pytest.mark.parametrize("size", [(640, 480), (448, 448), (336, 336), (1, 1), (1, 10000), (1000, 100)])
@pytest.mark.parametrize("use_thumbnail", [False, True])
def test_tiles_are_counted_from_the_header_thumbnail_included(size: tuple[int, int], use_thumbnail: bool) -> None:
    processor = ImageProcessor(ImageConfig(image_size=32, max_tiles=6, use_thumbnail=use_thumbnail))
    data = picture(size=size, kind="JPEG")
    columns, rows = processor.grid(*size)
    count = processor.count_tiles(*read_size(data[:700]))
    assert count == len(processor(data)) == columns * rows + (use_thumbnail and columns * rows > 1)


# ---- the pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_becomes_one_uint8_tile(kind: str) -> None:
    tiles = ImageProcessor(ImageConfig(image_size=8))(picture((255, 0, 0), (20, 12), kind))
    assert tiles.shape == (1, 3, 8, 8) and tiles.dtype == torch.uint8
    torch.testing.assert_close(tiles[0], torch.tensor([255, 0, 0]).byte().view(3, 1, 1).expand(3, 8, 8), atol=2, rtol=0)


def test_tiles_are_in_row_order_with_the_thumbnail_last() -> None:
    config = ImageConfig(image_size=16, max_tiles=6, use_thumbnail=True)
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    for row, column in itertools.product(range(2), range(3)):
        pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 40 * (3 * row + column)
    tiles = ImageProcessor(config)(png(Image.fromarray(pixels)))
    assert tiles.shape == (7, 3, 16, 16) and tiles.is_contiguous(memory_format=torch.channels_last)
    assert [tile.unique().tolist() for tile in tiles[:6]] == [[40 * place] for place in range(6)]
    assert len(tiles[6].unique()) > 6 and tiles[6, 0, 0, 0] == 0 and tiles[6, 0, -1, -1] == 200


def test_pixels_are_unchanged_if_no_resizing_is_needed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    tiles = ImageProcessor(ImageConfig(image_size=8, max_tiles=2))(png(Image.fromarray(pixels)))
    assert torch.equal(torch.cat(list(tiles), dim=2), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (37, 211), (1, 1), (1, 1000), (512, 512)])
@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize(("side", "fewest"), [(448, 1), (336, 3)])
def test_normalized_tiles_equal_those_of_transformers(
    size: tuple[int, int], content: str, side: int, fewest: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = photo(size) if content == "photo" else Image.fromarray(noise)
    reference = GotOcr2ImageProcessor(
        crop_to_patches=True,
        min_patches=fewest,
        max_patches=12,
        size={"height": side, "width": side},
        image_mean=MEAN,
        image_std=STD,
    )
    expected = reference(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    config = ImageConfig(image_size=side, min_tiles=fewest, max_tiles=12, use_thumbnail=True)
    tiles = normalize(ImageProcessor(config)(png(image)), MEAN, STD)
    # The bytes are the same; transformers folds 1/255 into mean and standard deviation. Measured difference: 2.4e-7.
    torch.testing.assert_close(tiles, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1024, 300)])
def test_tiles_are_within_two_levels_of_pillows_resize(size: tuple[int, int]) -> None:
    config = ImageConfig(image_size=64, max_tiles=6)
    image = photo(size)
    columns, rows = ImageProcessor(config).grid(*size)
    # One direction at a time: Pillow 13 starts with the cheaper one, torch with the horizontal one, as Pillow used to.
    wide = image.resize((64 * columns, size[1]), Image.Resampling.BICUBIC)
    expected = np.asarray(wide.resize((64 * columns, 64 * rows), Image.Resampling.BICUBIC)).astype(int)
    tiles = ImageProcessor(config)(png(image))
    canvas = tiles.view(rows, columns, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(64 * rows, 64 * columns, 3)
    difference = np.abs(canvas.numpy() - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_an_image_is_rotated_by_exif_before_tiling() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(stream := io.BytesIO(), format="PNG", exif=exif)
    processor = ImageProcessor(ImageConfig(image_size=16, max_tiles=3))
    tiles = processor(stream.getvalue())
    assert processor.grid(*read_size(stream.getvalue())) == (1, 3)
    assert torch.equal(torch.cat(list(tiles), dim=1), torch.from_numpy(read_image(stream.getvalue())).permute(2, 0, 1))


# ---- the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "--image-size 0"),
        ({"min_tiles": 0}, "--min-tiles 0"),
        ({"max_tiles": 0}, "--max-tiles 0 is less than --min-tiles 1"),
        ({"min_tiles": 4, "max_tiles": 2}, "--max-tiles 2 is less than --min-tiles 4"),
        ({"use_thumbnail": True}, "--use-thumbnail .* --max-tiles 1 "),
    ],
)
def test_invalid_settings_are_refused_in_one_sentence(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ImageConfig(**settings)
    assert "\n" not in str(error.value)
