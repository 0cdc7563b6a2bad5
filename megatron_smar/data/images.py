# SPDX-License-Identifier: Apache-2.0
"""From an image file's bytes to its pixels as displayed: upright, RGB, 8 bits.

Pillow reads every header and decodes everything except plain JPEG. JPEG is decoded by libjpeg-turbo through simplejpeg,
which is faster, gives the same values and, unlike Pillow, reports a file that ends inside the image
(benchmarks/images.py measures both). The format of a file is taken from its content, never from its name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from megatron_smar.data.rejects import SampleError

# The formats of training data, without those whose readers run other programs or guess (EPS, WMF, TGA ...).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pillow refuses larger images from the header alone: 0.5 GB as RGB.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
# Factors by which Pillow scales PNG's gray values of 2 and 4 bits.
_GRAY_SCALES = {"L;2": 85, "L;4": 17}
# EXIF orientation -> (whether to swap the axes, then the step through the rows, and through the columns).
_ORIENTATIONS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def read_size(data: bytes) -> tuple[int, int]:
    """Returns width and height of an image file as displayed, from its header only.

    Raises:
        SampleError: `bad_image`, `image_too_large`.
    """

    def displayed_size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)

    return _guarded(data, displayed_size)


def read_image(data: bytes) -> np.ndarray:
    """Decodes an image file: rotated by its EXIF orientation, transparency on white, the first frame of an animation.

    Returns:
        [height, width, 3] uint8, RGB.

    Raises:
        SampleError: `bad_image` if the file is damaged or truncated; `image_too_large` if its header gives more than
            `MAX_PIXELS` pixels, of which none is decoded.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        orientation = _ORIENTATIONS.get(_orientation(image))
        decoded = _decode_jpeg(data, image) if image.format in ("JPEG", "MPO") else _decode(image, data)
        if orientation is None:
            return decoded
        swap, rows, columns = orientation
        return np.ascontiguousarray((decoded.swapaxes(0, 1) if swap else decoded)[::rows, ::columns])

    return _guarded(data, pixels)


def read_each[T](files: Sequence[bytes], read: Callable[[bytes], T]) -> list[T]:
    """Applies `read` to each image file of a sample; an error in one of several names the image's number.

    Raises:
        SampleError: `read` raised it.
    """
    found = []
    for number, data in enumerate(files, 1):
        try:
            found.append(read(data))
        except SampleError as error:
            raise SampleError(error.reason, which(number, len(files)) + error.message) from error
    return found


def which(number: int, total: int) -> str:
    """Returns the prefix of a message about one of several images; "" if there is only one image."""
    return f"image {number} of {total}: " if total > 1 else ""


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray:
    if image.mode not in ("RGB", "L"):  # CMYK, which Adobe writes inverted and Pillow knows about
        return _decode(image, data)
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        # Pillow would continue and leave the rest of the image gray. Other errors, such as those about the scan
        # parameters that some phones write, do not affect the pixels.
        if str(error).startswith(("Corrupt", "Premature")):
            raise
        return _decode(image, data)


def _decode(image: Image.Image, data: bytes) -> np.ndarray:
    # The raw mode of PNG's decoder.
    layout = image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None
    if layout in ("RGB;16B", "RGBA;16B"):
        return _decode_deep_colors(image, data)
    if isinstance(layout, str) and layout in _GRAY_SCALES and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= _GRAY_SCALES[layout]  # Pillow scales the pixels, but not PNG's transparent level
    image.load()
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # TIFF's
    if image.mode == "F" or tags.get(SAMPLEFORMAT, (1,))[0] != 1:
        raise _unknown_white(image)
    if image.mode[0] == "I":
        return _decode_deep(image, tags)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _decode_deep(image: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
    """Scales gray values of more than 8 bits, which Pillow would clip to white instead."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise _unknown_white(image)
    white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1  # 12 bits are not stretched to 16
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero, which Pillow handles only up to 8 bits
        values = white - values
    gray = (values * (255 / white)).round().astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return np.repeat(gray[..., None], 3, axis=2)


def _unknown_white(image: Image.Image) -> SampleError:
    return SampleError(
        "bad_image",
        f"an image has pixels of mode {image.mode}, signed or larger than 16 bits, whose white level is not known: "
        "store it with unsigned values of 8 or 16 bits",
    )


def _decode_deep_colors(image: Image.Image, data: bytes) -> np.ndarray:
    """Decodes colors of 16 bits. Pillow keeps only the high byte; PNG's transparent color and alpha need both bytes."""
    low = Image.open(io.BytesIO(data), formats=["PNG"])
    low.tile = [tile._replace(args=str(tile.args).replace("16B", "16L")) for tile in low.tile]
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    colors = values[..., :3] / 257
    if values.shape[-1] == 4:
        share = values[..., 3:] / 65535
        colors = share * colors + (1 - share) * 255
    if "transparency" in image.info:
        colors[(values[..., :3] == image.info["transparency"]).all(axis=-1)] = 255
    return colors.round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, that still has to be applied; 1 is upright."""
    if image.format == "TIFF":  # Pillow rotates these itself, and returns the rotated size
        return 1
    try:
        # The base class's method: PNG's would decode the full image to look for EXIF data after the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data in a valid image: displayed as stored, as every viewer does
        return 1
    return orientation if orientation in _ORIENTATIONS else 1


def _guarded[T](data: bytes, read: Callable[[Image.Image], T]) -> T:
    """Opens an image and applies `read`; any error of Pillow or simplejpeg becomes a SampleError."""
    try:
        # Pillow warns about sizes, EXIF and palettes; what matters is an error here.
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if min(image.size) < 1:
                raise ValueError(f"it is {image.width} x {image.height} pixels")
            return read(image)
    except (SampleError, MemoryError):  # a rank that is out of memory must not skip a sample that its peers keep
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(
            "image_too_large", f"an image has more than {MAX_PIXELS} pixels, which are not decoded: shrink it"
        ) from error
    except Exception as error:  # Pillow's plugins raise almost any exception on damaged files
        message = str(error).split("<_io.BytesIO", 1)[0].strip() or type(error).__name__
        raise SampleError("bad_image", f"an image cannot be decoded ({message})") from error
