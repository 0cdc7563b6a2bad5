# SPDX-License-Identifier: Apache-2.0
"""Speed of image libraries on one core, from an image file to tiles, and the difference of their pixels from Pillow's.

    python benchmarks/images.py [--quick] [--json]

Three parts are measured: decoding to RGB bytes, bicubic resizing of decoded pixels, and all steps from a file to uint8
tiles. `ours` is the code of the data workers, `pillow` the usual code (decode, resize, crop, convert to a tensor).
Libraries that are not installed are listed and skipped; to include those that the project does not use:

    pip install opencv-python-headless 'pyvips[binary]' imagecodecs torchvision

The methods run in turns, in alternating order, with one thread each. CPU time is measured, so that other programs on
the machine have little effect; a ratio is the median over turns of Pillow's time divided by the method's. Differences
are the largest over all pixels, in gray levels of 255. Resizing differs much from Pillow's if it does not filter before
shrinking (OpenCV's bicubic), or filters differently (libvips). The images are one photograph (matplotlib's sample, with
grain) at sizes that occur in LLaVA's data.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", VIPS_CONCURRENCY="1")  # read when the libraries are loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message=".*(Transformer Engine|dynamic_context|not writable)")

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from megatron_smar.data.images import read_image
from megatron_smar.data.tiling import ImageConfig, ImageProcessor

SIDE = 448
PICTURES = {
    "336x336.jpg": ((336, 336), "JPEG"),
    "640x480.jpg": ((640, 480), "JPEG"),
    "1024x768.jpg": ((1024, 768), "JPEG"),
    "640x480.png": ((640, 480), "PNG"),
}
LIBRARIES = {"opencv": "cv2", "torchvision": "torchvision", "libvips": "pyvips", "imagecodecs": "imagecodecs"}
CONFIGS = {
    "1 tile": ImageConfig(SIDE),
    "1..12 tiles": ImageConfig(SIDE, max_tiles=12, use_thumbnail=True),
}
Method = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: What is measured: `decode`, `resize` or `tiles`.
        picture: Image file, and its size or tiling after the step.
        method: Library, or `ours`.
        images_per_second: Images per second on one core, from the median time.
        tiles_per_second: The same in tiles; None except in the part `tiles`.
        ratio: Speed relative to Pillow; the median over turns.
        max_difference: Largest difference from Pillow's pixels, in gray levels.
    """

    part: str
    picture: str
    method: str
    images_per_second: float
    tiles_per_second: float | None
    ratio: float
    max_difference: int


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="Turns of each measurement. Default: %(default)s.")
    parser.add_argument("--quick", action="store_true", help="Eight turns, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds} gives no median; give 2 or more.")
    options.rounds = 8 if options.quick else options.rounds
    return options


def make_pictures() -> dict[str, bytes]:
    """Returns the contents of the image files by name."""
    from matplotlib import cbook

    files, random = {}, np.random.default_rng(0)
    photo = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    for name, (size, kind) in PICTURES.items():
        pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS)).astype(float)
        pixels = (pixels + random.normal(0, 6, (*pixels.shape[:2], 1))).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(stream := io.BytesIO(), kind, **({"quality": 90} if kind == "JPEG" else {}))
        files[name] = stream.getvalue()
    return files


def installed() -> set[str]:
    """Returns the libraries of LIBRARIES that are installed, after limiting them to one thread."""
    found = {name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)}
    torch.set_num_threads(1)
    if "opencv" in found:
        import cv2

        cv2.setNumThreads(1)
    return found


# ---- methods: Pillow's first, as the reference for the others


def decoders(name: str, found: set[str]) -> dict[str, Method]:
    """Returns methods that decode a file to [h, w, 3] uint8."""
    methods: dict[str, Method] = {
        "pillow": lambda data: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
        "ours": read_image,
    }
    if "opencv" in found:
        import cv2

        methods["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if "torchvision" in found:
        from torchvision.io import ImageReadMode, decode_image

        methods["torchvision"] = lambda data: decode_image(
            torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB
        ).permute(1, 2, 0)
    if "libvips" in found:
        import pyvips

        methods["libvips"] = lambda data: pyvips.Image.new_from_buffer(data, "", access="sequential").numpy()
    if "imagecodecs" in found:
        import imagecodecs

        methods["imagecodecs"] = imagecodecs.jpeg8_decode if name.endswith("jpg") else imagecodecs.png_decode
    return methods


def resizers(size: tuple[int, int], found: set[str]) -> dict[str, Method]:
    """Returns methods that resize [h, w, 3] uint8 to `size` (width, height), in the library's own memory layout."""
    methods: dict[str, Method] = {
        "pillow": lambda pixels: np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)),
        "ours (torch)": lambda pixels: torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None], size[::-1], mode="bicubic", antialias=True
        )[0].permute(1, 2, 0),
    }
    if "opencv" in found:
        import cv2

        methods["opencv"] = lambda pixels: cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    if "libvips" in found:
        import pyvips

        def by_vips(pixels: np.ndarray) -> np.ndarray:
            across, down = size[0] / pixels.shape[1], size[1] / pixels.shape[0]
            return pyvips.Image.new_from_array(pixels).resize(across, vscale=down, kernel="cubic").numpy()

        methods["libvips"] = by_vips
    return methods


def tilers(config: ImageConfig) -> dict[str, Method]:
    """Returns methods that turn a file into tiles [tiles, 3, SIDE, SIDE] uint8."""
    processor = ImageProcessor(config)
    return {"pillow": functools.partial(pillow_tiles, processor), "ours": processor}


def pillow_tiles(processor: ImageProcessor, data: bytes) -> torch.Tensor:
    """Makes tiles in the usual way, like InternVL's own code."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = processor.grid(*image.size)
    canvas = image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    corners = [(SIDE * column, SIDE * row) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    if processor.config.use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return torch.from_numpy(np.stack([np.array(tile) for tile in tiles])).permute(0, 3, 1, 2).contiguous()


# ---- measuring


def measure(part: str, picture: str, methods: dict[str, Method], given: Any, rounds: int) -> list[Row]:
    """Times the methods in turns, and compares their results with Pillow's."""
    results = {name: torch.as_tensor(method(given)).int() for name, method in methods.items()}  # also warms up
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        for name in methods if turn % 2 == 0 else reversed(methods):
            begin = time.process_time()
            methods[name](given)
            seconds[name].append(time.process_time() - begin)
    rows = []
    for name, taken in seconds.items():
        speed = 1 / statistics.median(taken)
        ratio = statistics.median(usual / own for usual, own in zip(seconds["pillow"], taken, strict=True))
        difference = int((results[name] - results["pillow"]).abs().max())
        tiles = speed * len(results[name]) if part == "tiles" else None
        rows.append(Row(part, picture, name, speed, tiles, ratio, difference))
    return rows


def measure_all(files: dict[str, bytes], found: set[str], rounds: int) -> list[Row]:
    """Measures all three parts."""
    rows: list[Row] = []
    jobs: list[tuple[str, str, dict[str, Method], Any]] = []
    for name, data in files.items():
        jobs.append(("decode", name, decoders(name, found), data))
        pixels = read_image(data)
        for label, config in CONFIGS.items():
            columns, lines = ImageProcessor(config).grid(*PICTURES[name][0])
            if label == "1 tile" or columns * lines > 1:
                size = (columns * SIDE, lines * SIDE)
                if name.endswith("jpg"):
                    jobs.append(("resize", f"{name} to {size[0]}x{size[1]}", resizers(size, found), pixels))
                jobs.append(("tiles", f"{name}, {label}", tilers(config), data))
    for part, name, methods, given in tqdm(jobs, desc="measuring", disable=None):
        rows += measure(part, name, methods, given, rounds)
    return rows


def differences_from_transformers(files: dict[str, bytes], found: set[str]) -> dict[str, float]:
    """Returns the largest difference of "ours" from transformers' image processors, by their resizing library."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    kinds: dict[str, Any] = {"pillow": GotOcr2ImageProcessorPil}
    if "torchvision" in found:
        kinds["torchvision"] = GotOcr2ImageProcessor
    settings = {"crop_to_patches": True, "max_patches": 12, "size": {"height": SIDE, "width": SIDE}}
    ours, differences = ImageProcessor(CONFIGS["1..12 tiles"]), dict.fromkeys(kinds, 0.0)
    for backend, kind in kinds.items():
        processor = kind(**settings, do_rescale=False, do_normalize=False)
        for data in files.values():
            theirs = processor(images=[Image.fromarray(read_image(data))], return_tensors="pt")["pixel_values"]
            differences[backend] = max(differences[backend], float((theirs.float() - ours(data)).abs().max()))
    return differences


def print_table(rows: list[Row]) -> None:
    """Prints the table of results."""
    print(f"{'part':8}{'picture':28}{'method':14}{'images/s':>10}{'tiles/s':>10}{'x pillow':>10}{'difference':>12}")
    for row in rows:
        tiles = f"{row.tiles_per_second:10.0f}" if row.tiles_per_second else " " * 10
        numbers = f"{row.images_per_second:10.1f}{tiles}{row.ratio:10.2f}{row.max_difference:12d}"
        print(f"{row.part:8}{row.picture:28}{row.method:14}{numbers}")


def main() -> None:
    """Runs the benchmark and prints its results."""
    options = parse()
    found, files = installed(), make_pictures()
    absent = [name for name in LIBRARIES if name not in found]
    rows = measure_all(files, found, options.rounds)
    print_table(rows)
    differences = differences_from_transformers(files, found)
    for backend, difference in differences.items():
        print(f"tiles differ from transformers' image processor ({backend}) by at most {difference:g} grey levels")
    if absent:
        print(f"not installed, so not measured: {', '.join(absent)}")
    own = {row.picture: row.ratio for row in rows if row.part == "tiles" and row.method == "ours"}
    print(f"file to tiles, ours over Pillow: {min(own.values()):.2f} to {max(own.values()):.2f} times as fast")
    if options.json:
        result = {
            "ratio_pillow": statistics.geometric_mean(own.values()),
            "rows": [vars(row) for row in rows],
            "differences_transformers": differences,
            "absent": absent,
            "rounds": options.rounds,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
