# SPDX-License-Identifier: Apache-2.0
"""From an image file to the tiles that the vision encoder sees."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image

from megatron_smar.data.rejects import SampleError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TURNS = {  # EXIF orientation -> what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageConfig:
    """How images become tiles.

    Args:
        image_size: Side of a tile in pixels (``--image-size``).
        max_tiles: Most tiles of an image (``--max-tiles``); only 1 as yet: the image is resized to one tile.
        use_thumbnail: Add the whole image as a tile where there is more than one (``--use-thumbnail``).
        mean: Mean of each channel, of values 0..1; ImageNet's, as InternVL's.
        std: Standard deviation of each channel.
    """

    image_size: int = 448
    max_tiles: int = 1
    use_thumbnail: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Check the values."""
        if self.image_size < 1:
            raise ValueError(f"--image-size {self.image_size} is not a number of pixels: give one above 0.")
        if self.max_tiles != 1 or self.use_thumbnail:
            flag = "--use-thumbnail" if self.max_tiles == 1 else f"--max-tiles {self.max_tiles}"
            raise ValueError(f"{flag} needs dynamic tiling, which is not there yet: use --max-tiles 1 alone.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"Image mean {self.mean} and std {self.std} must have 3 channels each, the std above 0.")


class ImageProcessor:
    """Image files to normalised tiles.

    Args:
        config: Sizes and normalisation.
    """

    def __init__(self, config: ImageConfig) -> None:
        """Keep the configuration and its constants."""
        self.config = config
        self._mean = torch.tensor(config.mean).view(3, 1, 1)
        self._std = torch.tensor(config.std).view(3, 1, 1)

    def count_tiles(self, width: int, height: int) -> int:
        """Return the number of tiles of an image of that size as it is shown, so that no pixels are needed for it."""
        return 1

    def empty(self) -> torch.Tensor:
        """Return the tiles of no image, [0, 3, H, W]."""
        return torch.empty(0, 3, self.config.image_size, self.config.image_size)

    def __call__(self, data: bytes) -> torch.Tensor:
        """Decode an image file and return its tiles, [tiles, 3, H, W] float32.

        Raises:
            SampleError: ``bad_image``.
        """
        size = (self.config.image_size, self.config.image_size)
        image = read_image(data).resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(self._mean).div_(self._std).unsqueeze(0)


def read_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image file as it is shown, from its header alone.

    Raises:
        SampleError: ``bad_image``.
    """

    def size() -> tuple[int, int]:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)

    return _guarded(size)


def read_image(data: bytes) -> Image.Image:
    """Decode an image file: turned upright, transparency on white, RGB.

    Raises:
        SampleError: ``bad_image``.
    """

    def decode() -> Image.Image:
        image: Image.Image = Image.open(io.BytesIO(data))
        turn = _TURNS.get(_orientation(image))
        image.load()
        if image.mode.startswith("I"):
            # Pillow clips 16-bit grey to 8 bits, which leaves it white.
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)

    return _guarded(decode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8, as the header has it."""
    # The base class's method: PNG's own would decode the whole image to look for one behind the pixels.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _TURNS else 1


def _guarded[T](decode: Callable[[], T]) -> T:
    try:
        return decode()
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        message = str(error).split("<_io.BytesIO", 1)[0].strip() or type(error).__name__
        raise SampleError("bad_image", f"an image cannot be decoded ({message})") from error
