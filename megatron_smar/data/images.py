# SPDX-License-Identifier: Apache-2.0
"""From an image file's bytes to its pixels as they are shown: upright, RGB, 8 bits.

Pillow reads every header and decodes what is no plain JPEG. JPEG's pixels come from libjpeg-turbo by way of simplejpeg:
the same values, faster, and unlike Pillow it says so when a file breaks off inside a picture
(tools/benchmark/images.py measures both). Files are judged by their content, never by their names.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from megatron_smar.data.rejects import SampleError

# What training data holds; left out are formats whose readers run other programs or guess (EPS, WMF, TGA ...).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pillow refuses more, from the header: 0.5 GB as RGB.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
# EXIF orientation -> (swap the axes, then step through the rows, and through the columns).
_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def read_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image file as it is shown, from its header alone.

    Raises:
        SampleError: ``bad_image``, ``image_too_large``.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)

    return _guarded(data, size)


def read_image(data: bytes) -> np.ndarray:
    """Decode an image file: turned upright as its EXIF says, transparency on white, an animation's first frame.

    Returns:
        [height, width, 3] uint8, red, green, blue.

    Raises:
        SampleError: ``bad_image`` if the file is damaged, or ends before its picture does; ``image_too_large`` if its
            header promises more than `MAX_PIXELS` pixels, of which none is decoded.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        turn = _TURNS.get(_orientation(image))
        decoded = _decode_jpeg(data, image) if image.format in ("JPEG", "MPO") else _decode(image)
        if turn is None:
            return decoded
        swap, rows, columns = turn
        return np.ascontiguousarray((decoded.swapaxes(0, 1) if swap else decoded)[::rows, ::columns])

    return _guarded(data, pixels)


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray:
    if image.mode not in ("RGB", "L"):  # CMYK, which Adobe writes inverted and Pillow knows about
        return _decode(image)
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        # Pillow would go on and leave the rest of the picture grey. Other complaints, such as the scan parameters that
        # some phones write, do not touch the pixels.
        if str(error).startswith(("Corrupt", "Premature")):
            raise
        return _decode(image)


def _decode(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode[0] in "IF":
        return _decode_deep(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _decode_deep(image: Image.Image) -> np.ndarray:
    """Scale 16-bit grey to 8 bits, which Pillow would clip instead, so that it is left white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise SampleError("bad_image", f"an image has pixels of mode {image.mode}, whose white level is not known")
    grey = (values / 257).round().astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8, that is left to be applied; 1 is none."""
    if image.format == "TIFF":  # Pillow turns these itself, and gives the turned size
        return 1
    try:
        # The base class's method: PNG's own would decode the whole image to look for one behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF beside a sound picture: shown as it is stored, as every viewer does
        return 1
    return orientation if orientation in _TURNS else 1


def _guarded[T](data: bytes, read: Callable[[Image.Image], T]) -> T:
    """Open an image and read something from it, with one kind of error for whatever Pillow and simplejpeg raise."""
    try:
        # Pillow warns about sizes, EXIF and palettes; what matters of it is an error here.
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if min(image.size) < 1:
                raise ValueError(f"it is {image.width} x {image.height} pixels")
            return read(image)
    except (SampleError, MemoryError):  # a rank short of memory must not skip what its peers keep
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(
            "image_too_large", f"an image has more than {MAX_PIXELS} pixels, which are not decoded: shrink it"
        ) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        message = str(error).split("<_io.BytesIO", 1)[0].strip() or type(error).__name__
        raise SampleError("bad_image", f"an image cannot be decoded ({message})") from error
