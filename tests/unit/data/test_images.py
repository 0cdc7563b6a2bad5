# SPDX-License-Identifier: Apache-2.0
"""Image files to pixels: every format is decoded as displayed, and damaged files are refused."""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib.cbook
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megatron_smar.data import images
from megatron_smar.data.images import read_image, read_size
from megatron_smar.data.rejects import SampleError

KINDS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "lossless WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "JPEG2000": {},
    "AVIF": {},
    "PPM": {},
}
ROTATABLE = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(stream := io.BytesIO(), format=kind.split()[-1], **(KINDS.get(kind, {}) | options))
    return stream.getvalue()


def png(size: tuple[int, int], depth: int, color: int, rows: Sequence[bytes], chunks: bytes = b"") -> bytes:
    """Writes a PNG byte by byte, for variants that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + data + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def refused(data: bytes) -> SampleError:
    with pytest.raises(SampleError) as error:
        read_image(data)
    assert "BytesIO" not in str(error.value) and "\n" not in str(error.value)
    return error.value


# ---- kinds of pixels


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_pillows_pixels(kind: str) -> None:
    data = encode(Image.fromarray(noise(31, 45, 3)), kind)
    pixels = read_image(data)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_jpeg_decoder_gives_pillows_pixels(mode: str, sampling: str) -> None:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert(mode)
    data = encode(photo, "JPEG", quality=85, subsampling=sampling)
    np.testing.assert_array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_adobes_inverted_cmyk_jpeg_is_not_a_negative() -> None:
    data = encode(Image.fromarray(noise(16, 16, 4), "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    inverted = simplejpeg.decode_jpeg(data, "CMYK").astype(int)  # as stored: 255 is no ink
    expected = inverted[..., :3] * inverted[..., 3:] / 255
    assert np.abs(read_image(data) - expected).max() <= 1


def test_16_bit_gray_is_not_clipped_to_white() -> None:
    gray = np.random.default_rng(0).integers(0, 65536, (9, 7), dtype=np.uint16)
    pixels = read_image(encode(Image.fromarray(gray), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat((gray / 65535 * 255).round()[..., None], 3, axis=2))


def packed(values: Sequence[int], depth: int) -> bytes:
    """Packs a row of samples of `depth` bits each, as in PNG and TIFF."""
    bits = "".join(format(value, f"0{depth}b") for value in values)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))


def levels(depth: int) -> list[int]:
    """Returns up to 256 gray levels from black to white."""
    return np.linspace(0, 2**depth - 1, min(2**depth, 256)).round().astype(int).tolist()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_only_the_transparent_gray_level_becomes_white(depth: int) -> None:
    gray = levels(depth)
    for level in (*gray[:16], gray[-1]):
        data = png((len(gray), 1), depth, 0, [packed(gray, depth)], chunk(b"tRNS", struct.pack(">H", level)))
        expected = [255 if value == level else round(value / (2**depth - 1) * 255) for value in gray]
        assert read_image(data)[0, :, 0].tolist() == expected, f"level {level} of {depth} bits"


@pytest.mark.parametrize("depth", [8, 16])
def test_only_the_transparent_color_becomes_white(depth: int) -> None:
    transparent, neighbor, other = (200, 17, 3), (200, 17, 2), (9, 8, 7)
    row = packed([*transparent, *neighbor, *other], depth)
    data = png((3, 1), depth, 2, [row], chunk(b"tRNS", struct.pack(">3H", *transparent)))
    scale = 255 / (2**depth - 1)
    expected = [[255] * 3, *([round(value * scale) for value in color] for color in (neighbor, other))]
    assert read_image(data)[0].tolist() == expected


@pytest.mark.parametrize("alpha", [False, True])
def test_16_bit_colors_are_rounded_correctly(alpha: bool) -> None:
    colors = np.random.default_rng(0).integers(0, 65536, (4, 5, 4 if alpha else 3))
    pixels = read_image(png((5, 4), 16, 6 if alpha else 2, [row.astype(">u2").tobytes() for row in colors]))
    share = colors[..., 3:] / 65535 if alpha else 1
    np.testing.assert_array_equal(pixels, (share * colors[..., :3] / 257 + (1 - share) * 255).round())


def tiff(values: Sequence[int], depth: int, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """Writes a little-endian TIFF with one row of gray byte by byte, for variants that Pillow does not write."""
    row = np.array(values, "<u2").tobytes() if depth == 16 else packed(values, depth)
    photometric = 0 if white_is_zero else 1
    short = {258: depth, 259: 1, 262: photometric, 277: 1, 339: sample_format}
    tags = short | {256: len(values), 257: 1, 273: 8, 278: 1, 279: len(row)}
    entries = [struct.pack("<HHII", tag, 3 if tag in short else 4, 1, value) for tag, value in sorted(tags.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + directory


@pytest.mark.parametrize(
    ("depth", "white_is_zero"), [(d, w) for d in (1, 2, 4, 8, 12, 16) for w in (False, True) if (d, w) != (12, True)]
)
def test_gray_of_any_depth_in_a_tiff_has_the_right_brightness(depth: int, white_is_zero: bool) -> None:
    gray = levels(depth)
    expected = np.array(gray) / (2**depth - 1) * 255
    pixels = read_image(tiff(gray, depth, white_is_zero))
    np.testing.assert_array_equal(pixels[0, :, 0], (255 - expected if white_is_zero else expected).round())


@pytest.mark.parametrize("depth", [8, 16])
def test_signed_gray_is_refused(depth: int) -> None:
    assert "white level is not known" in refused(tiff(levels(depth), depth, sample_format=2)).message


@pytest.mark.parametrize("most", [1, 15, 255, 1000, 4095, 65535])
def test_the_maximum_value_of_a_portable_graymap_is_white(most: int) -> None:
    gray = np.linspace(0, most, 8).round()
    data = b"P5 8 1 %d\n" % most + gray.astype(">u2" if most > 255 else "u1").tobytes()
    np.testing.assert_array_equal(read_image(data)[0, :, 0], (gray / most * 255).round())


@pytest.mark.parametrize("kind", ["PNG", "lossless WEBP", "TIFF"])
def test_transparency_is_composited_on_white(kind: str) -> None:
    rgba = noise(12, 10, 4)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    pixels = read_image(encode(Image.fromarray(rgba), kind, **({"exact": True} if "WEBP" in kind else {})))
    assert np.abs(pixels - expected).max() <= 1


def test_gray_with_transparency_is_composited_on_white() -> None:
    la = noise(12, 10, 2)
    alpha = la[..., 1:] / 255
    pixels = read_image(encode(Image.fromarray(la, "LA"), "PNG"))
    assert np.abs(pixels - (alpha * la[..., :1] + (1 - alpha) * 255)).max() <= 1


def test_a_palettes_colors_and_transparency_are_kept() -> None:
    palette, alpha, index = noise(4, 3), np.array([255, 0, 128, 255]), np.arange(12).reshape(3, 4) % 4
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(palette.tobytes())
    pixels = read_image(encode(image, "PNG", transparency=bytes(alpha.tolist())))
    share = alpha[:, None] / 255
    assert np.abs(pixels - (share * palette + (1 - share) * 255)[index]).max() <= 1
    np.testing.assert_array_equal(read_image(encode(image, "PNG")), palette[index])


def test_one_bit_images_are_black_and_white() -> None:
    bits = noise(6, 8) > 127
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(bits), "PNG"))[..., 1], bits * 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "lossless WEBP"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (9, 5), color) for color in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert read_size(data) == (9, 5) and (read_image(data) == (255, 0, 0)).all()


def test_the_first_image_of_an_mpo_file_is_used() -> None:
    frames = [Image.new("L", (16, 8), gray) for gray in (200, 50)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert (read_image(data) == 200).all()


def test_pixels_without_a_known_white_level_are_refused() -> None:
    for values in (np.full((3, 3), 0.5, np.float32), np.full((3, 3), 70000, np.int32)):
        assert refused(encode(Image.fromarray(values), "TIFF")).reason == "bad_image"


# ---- orientation and size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ROTATABLE)
def test_an_image_and_its_size_are_rotated_by_exif(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(24, 40, 3)), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = read_image(data)
    np.testing.assert_array_equal(pixels, expected)
    assert read_size(data) == (pixels.shape[1], pixels.shape[0]) == ((24, 40) if orientation > 4 else (40, 24))
    assert pixels.flags.c_contiguous


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    kind=st.sampled_from(list(KINDS)),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"]),
    orientation=st.integers(0, 9),
)
def test_the_size_from_the_header_equals_the_decoded_size(
    width: int, height: int, kind: str, mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        data = encode(Image.new("RGB", (width, height), "red").convert(mode), kind, exif=exif)
    except (OSError, KeyError, ValueError):  # a format without this mode
        return
    assert read_size(data) == read_image(data).shape[1::-1]


def test_a_valid_image_with_damaged_exif_is_shown_as_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(noise(8, 12, 3)), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    damaged = data[:start] + b"\xff" * 16 + data[start + 16 :]
    assert read_size(damaged) == (12, 8) and read_image(damaged).shape == (8, 12, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_of_one_pixel_or_one_line_are_used(kind: str, size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size, "white"), kind)
    assert read_size(data) == size and (read_image(data) == 255).all() and read_image(data).shape == (*size[::-1], 3)


# ---- damage


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_image_is_refused_wherever_it_ends(kind: str, mode: str) -> None:
    complete = encode(Image.fromarray(noise(48, 40, 3)).convert(mode), kind)
    expected = read_image(complete)
    for length in range(0, len(complete), len(complete) // 60):
        try:
            pixels = read_image(complete[:length])
        except SampleError as error:
            assert error.reason == "bad_image"
        else:  # only the end marker of the file is missing
            np.testing.assert_array_equal(pixels, expected)


def test_a_truncated_jpeg_with_an_end_marker_is_refused() -> None:
    data = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    early_end = data[: len(data) // 2] + b"\xff\xd9"
    assert Image.open(io.BytesIO(early_end)).convert("RGB").size == (64, 64)  # Pillow reports no error
    assert refused(early_end).reason == "bad_image"


def test_a_jpeg_with_a_phones_harmless_scan_parameters_is_used() -> None:
    data = bytearray(encode(Image.fromarray(noise(16, 16, 3)), "JPEG"))
    scan = data.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    expected = read_image(bytes(data))
    data[end - 3 : end] = bytes(3)
    with pytest.raises(ValueError, match="Invalid SOS parameters"):
        simplejpeg.decode_jpeg(bytes(data))
    np.testing.assert_array_equal(read_image(bytes(data)), expected)


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    data = bytearray(encode(Image.fromarray(noise(20, 20, 3)), "PNG"))
    data[len(data) // 2] ^= 16
    assert refused(bytes(data)).reason == "bad_image"


@pytest.mark.parametrize("data", [b"", b"\0", b"no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"])
def test_data_that_is_not_an_image_is_refused(data: bytes) -> None:
    assert refused(data).reason == "bad_image"
    with pytest.raises(SampleError, match="bad_image"):
        read_size(data)


def test_postscript_is_not_passed_to_an_interpreter() -> None:
    assert "cannot identify" in str(refused(encode(Image.new("RGB", (4, 4)), "EPS")))


def test_a_decompression_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
    bomb = png((30000, 30000), 8, 2, [bytes(12)])
    assert refused(bomb).reason == "image_too_large"
    with pytest.raises(SampleError, match=f"image_too_large: .* more than {images.MAX_PIXELS} pixels"):
        read_size(bomb)


def test_pillows_warnings_do_not_reach_the_terminal() -> None:
    large = png((12000, 9000), 1, 0, [bytes(1500)] * 9000)  # Pillow warns here
    palette = Image.fromarray(noise(3, 4) % 2, "P")
    palette.putpalette(noise(2, 3).tobytes())
    with warnings.catch_warnings(action="error"):
        assert read_size(large) == (12000, 9000)
        assert read_image(encode(palette, "PNG", transparency=bytes([0, 255]))).shape == (3, 4, 3)
