# SPDX-License-Identifier: Apache-2.0
"""Image files to tiles."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tiling import ImageConfig, ImageProcessor, read_image, read_size

from .conftest import picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_becomes_one_normalised_tile(kind: str) -> None:
    tiles = ImageProcessor(ImageConfig(image_size=8))(picture((255, 0, 0), (20, 12), kind))
    assert tiles.shape == (1, 3, 8, 8) and tiles.dtype == torch.float32
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(tiles[0], expected, atol=0.05, rtol=0)


def test_pixels_are_kept_where_no_resizing_is_needed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), format="PNG")
    config = ImageConfig(image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    tiles = ImageProcessor(config)(stream.getvalue())
    assert torch.equal((tiles[0] * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_transparency_is_white() -> None:
    assert read_image(picture((10, 20, 30, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_not_clipped_to_white() -> None:
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(stream := io.BytesIO(), format="PNG")
    assert read_image(stream.getvalue()).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new("RGB", (6, 6), "white").convert(mode)
    image.save(stream := io.BytesIO(), format=kind)
    assert read_image(stream.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_camera_orientation_is_applied_to_pixels_and_size() -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(stream := io.BytesIO(), format="PNG", exif=exif)
    shown = read_image(stream.getvalue())
    assert shown.size == (10, 20) == read_size(stream.getvalue())
    assert shown.getpixel((5, 0)) == (0, 0, 255) and shown.getpixel((5, 19)) == (255, 0, 0)


def test_tiles_are_counted_without_pixels() -> None:
    data = picture(size=(640, 480), kind="JPEG")
    processor = ImageProcessor(ImageConfig(image_size=8))
    assert processor.count_tiles(*read_size(data[: len(data) // 2])) == len(processor(data)) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("keep", [0, 20, 0.6])
def test_damaged_pictures_are_rejected(kind: str, keep: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(stream := io.BytesIO(), format=kind)
    data = stream.getvalue()
    with pytest.raises(SampleError) as error:
        read_image(data[: int(keep if keep >= 1 else len(data) * keep)])
    assert error.value.reason == "bad_image" and "BytesIO" not in str(error.value)


def test_more_tiles_wait_for_dynamic_tiling() -> None:
    with pytest.raises(ValueError, match="--max-tiles 12 needs dynamic tiling"):
        ImageConfig(max_tiles=12)
    with pytest.raises(ValueError, match="--use-thumbnail needs dynamic tiling"):
        ImageConfig(use_thumbnail=True)


def test_sizes_and_deviations_must_be_positive() -> None:
    with pytest.raises(ValueError, match="--image-size 0"):
        ImageConfig(image_size=0)
    with pytest.raises(ValueError, match="std"):
        ImageConfig(std=(0, 1, 1))
