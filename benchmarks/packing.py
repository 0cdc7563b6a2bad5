# SPDX-License-Identifier: Apache-2.0
"""Fill and speed of sequence packing, compared with the same algorithm in Python and with Megatron-LM's knapsack.

    python benchmarks/packing.py [--image llava tile tiles] [--max-tokens 16384] [--window 4000]
                                      [--megatron PATH] [--quick] [--json]

The lengths are those of LLaVA-1.5's instruction mixture (llava_v1_5_mix665k), RECONSTRUCTED, not read from the data:

- published: the conversations per source (arXiv 2310.03744, table 7) and the rules by which they were made (questions
  about one image are merged, at most 10 annotations per image, ShareGPT truncated at 2048 tokens); questions per image
  from the sizes of VQAv2, GQA, OK-VQA and OCR-VQA; tokens of LLaVA-Instruct from its file sizes (LLaVA's docs/Data.md)
  without the JSON around the text, at 4.4 characters per token; tokens of ShareGPT's turns from arXiv 2309.06180
  (161 + 338);
- estimated here: the tokens per turn of the other sources, from their templates; the turns of ShareGPT, Visual Genome
  and RefCOCO; all spreads (log-normal tokens, Poisson turns, geometric turns for ShareGPT); the image sizes.

An image takes 576 tokens (`--image llava`, LLaVA-1.5), 256 (`tile`, one of InternVL's) or 256 for each of InternVL's
1 to 12 tiles and thumbnail (`tiles`). Samples longer than a pack are left out, as in the loader.

Three packers are compared, one after another on the same lists, in buffers of `--window` samples as in a loader:

    ours      megatron_smar.data.packing.pack, as users call it
    Python    the same algorithm with bisect, in this file; it must give the same packs (checked)
    Megatron  greedy_knapsack of Megatron-LM's examples/multimodal: repeatedly takes the largest remaining sample that
              fits, found by bisect. Those examples are in no package: by default a reimplementation in this file is
              used, with --megatron PATH the function of a Megatron-LM checkout. It does not limit tiles.

Ratios are the median over rounds of the other packer's seconds divided by those of "ours".
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CAPACITIES = (2048, 4096, 8192, 16384, 32768)
WINDOWS = (500, 1000, 2000, 4000, 10000, None)
LONGEST_TEXT = 2048  # tokens at which LLaVA-1.5 truncates
PROMPT = 35  # Vicuna's system prompt, once per conversation
Packs = list[list[int]]


@dataclass(frozen=True)
class Source:
    """One source of the mixture.

    Attributes:
        thousands: Conversations, in thousands.
        turns: Mean number of questions per conversation.
        tokens: Mean number of tokens of a question with its answer and the template around them.
        spread: Standard deviation of the logarithm of that number.
        size: Width and height of a typical image; None for text only.
    """

    thousands: float
    turns: float
    tokens: float
    spread: float
    size: tuple[int, int] | None


SOURCES = {
    "LLaVA conversation": Source(58, 4.5, 75, 0.35, (640, 480)),
    "LLaVA detail": Source(23, 1, 148, 0.3, (640, 480)),
    "LLaVA reasoning": Source(77, 1, 180, 0.25, (640, 480)),
    "ShareGPT": Source(40, 3.5, 161 + 338, 1.0, None),
    "VQAv2": Source(83, 443_757 / 82_783, 17, 0.25, (640, 480)),
    "GQA": Source(72, 943_000 / 72_140, 18, 0.25, (500, 375)),
    "OK-VQA": Source(9, 9_009 / 8_998, 31, 0.25, (640, 480)),
    "OCR-VQA": Source(80, 1_002_146 / 207_572, 22, 0.3, (333, 500)),
    "A-OKVQA": Source(66, 1, 60, 0.2, (640, 480)),
    "TextCaps": Source(22, 1, 75, 0.4, (1024, 768)),
    "RefCOCO": Source(48, 5, 55, 0.15, (640, 480)),
    "Visual Genome": Source(86, 9, 50, 0.15, (500, 375)),
}


def draw_texts(source: Source, count: int, generator: np.random.Generator) -> np.ndarray:
    """Samples the tokens of `count` conversations without their images, [count]."""
    if source.size is None:
        turns = generator.geometric(1 / source.turns, count)
    else:
        turns = 1 + generator.poisson(source.turns - 1, count)
    # Log-normal with the mean `tokens`.
    lengths = generator.lognormal(np.log(source.tokens) - source.spread**2 / 2, source.spread, turns.sum())
    sums = np.add.reduceat(lengths, np.cumsum(turns) - turns)
    return np.minimum(PROMPT + sums, LONGEST_TEXT).astype(np.int64)


def draw_tiles(source: Source, count: int, image: str, generator: np.random.Generator) -> np.ndarray:
    """Samples the number of tiles of `count` conversations, [count]."""
    if source.size is None:
        return np.zeros(count, dtype=np.int64)
    if image != "tiles":
        return np.ones(count, dtype=np.int64)
    from megatron_smar.data.tiling import ImageConfig, ImageProcessor

    count_tiles = ImageProcessor(ImageConfig(max_tiles=12, use_thumbnail=True)).count_tiles
    width, height = source.size
    # Most images have the typical shape, a quarter is rotated, and the rest is cropped to other shapes.
    shapes = [(width, height), (height, width), (width, width * 2 // 3), (width, width), (width, height // 2)]
    tiles = np.array([count_tiles(*shape) for shape in shapes])
    return tiles[generator.choice(len(shapes), count, p=[0.6, 0.25, 0.08, 0.04, 0.03])]


def draw(samples: int, image: str, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Samples tokens [samples] and tiles [samples] of the mixture, in random order; deterministic for a seed."""
    generator = np.random.default_rng(seed)
    shares = np.array([source.thousands for source in SOURCES.values()])
    source_of = generator.choice(len(SOURCES), samples, p=shares / shares.sum())
    tokens, tiles = np.zeros(samples, dtype=np.int64), np.zeros(samples, dtype=np.int64)
    for number, source in enumerate(SOURCES.values()):
        chosen = source_of == number
        count = int(chosen.sum())
        if count:
            tiles[chosen] = draw_tiles(source, count, image, generator)
            tokens[chosen] = draw_texts(source, count, generator)
    return tokens + tiles * (576 if image == "llava" else 256), tiles


def pack_python(
    tokens: Sequence[int],
    tiles: Sequence[int],
    max_tokens: int,
    max_tiles: int | None = None,
    window: int | None = None,
) -> Packs:
    """Packs like `megatron_smar.data.packing.pack`, in plain Python; gives the same packs."""
    packs: Packs = []
    window = window or max(1, len(tokens))
    for begin in range(0, len(tokens), window):
        samples = range(begin, min(begin + window, len(tokens)))
        packs += _pack_window(samples, tokens, tiles, max_tokens, max_tiles)
    return packs


def _pack_window(
    samples: range, tokens: Sequence[int], tiles: Sequence[int], max_tokens: int, max_tiles: int | None
) -> Packs:
    packs: Packs = []
    rooms: list[int] = []  # remaining tokens of the open packs, ascending
    levels: dict[int, list[int]] = {}  # remaining tokens -> remaining tiles, ascending
    stacks: dict[tuple[int, int], list[int]] = {}  # both -> packs, the last changed on top
    for sample in sorted(samples, key=lambda sample: -tokens[sample]):
        need, need_tiles = tokens[sample], 0 if max_tiles is None else tiles[sample]
        place = bisect_left(rooms, need)
        while place < len(rooms) and levels[rooms[place]][-1] < need_tiles:
            place += 1
        if place == len(rooms):
            pack, room, tile_room = len(packs), max_tokens, max_tiles or 0
            packs.append([])
        else:
            room = rooms[place]
            level = bisect_left(levels[room], need_tiles)
            tile_room = levels[room][level]
            stack = stacks[room, tile_room]
            pack = stack.pop()
            if not stack:
                del stacks[room, tile_room], levels[room][level]
                if not levels[room]:
                    del levels[room], rooms[place]
        packs[pack].append(sample)
        room, tile_room = room - need, tile_room - need_tiles
        if not room:
            continue
        if room not in levels:
            rooms.insert(bisect_left(rooms, room), room)
            levels[room] = []
        if (room, tile_room) not in stacks:
            levels[room].insert(bisect_left(levels[room], tile_room), tile_room)
            stacks[room, tile_room] = []
        stacks[room, tile_room].append(pack)
    return sorted(map(sorted, packs))  # by first index, since no two share one


def greedy_knapsack(item_sizes: list[int], samples: list[Any], max_capacity: int) -> list[list[Any]]:
    """Reimplements Megatron-LM's function of the same name."""
    by_size = sorted(zip(item_sizes, samples, strict=True), key=lambda pair: pair[0])
    sizes, left = [size for size, _ in by_size], [sample for _, sample in by_size]
    packs = []
    while sizes:
        pack, room = [], max_capacity
        while place := bisect_right(sizes, room):
            room -= sizes.pop(place - 1)
            pack.append(left.pop(place - 1))
        packs.append(pack)
    return packs


def load_knapsack(checkout: Path) -> Callable[..., list[list[Any]]]:
    """Loads greedy_knapsack from a Megatron-LM checkout, without the imports of its file.

    Raises:
        ValueError: The checkout has no such function.
    """
    path = checkout / "examples/multimodal/dataset_helpers.py"
    wanted = {"search_for_fit", "greedy_knapsack"}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"--megatron {checkout} is not a Megatron-LM checkout ({error}): give its top folder."
        ) from error
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    if {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} != wanted:
        raise ValueError(f"--megatron {checkout}: {path} has no greedy_knapsack with search_for_fit; leave it out.")
    import bisect

    names: dict[str, Any] = {"bisect": bisect, "List": list}
    exec(compile(tree, str(path), "exec"), names)
    return names["greedy_knapsack"]


def pack_knapsack(knapsack: Callable[..., Packs], tokens: list[int], max_tokens: int, window: int) -> Packs:
    """Packs with a knapsack function, buffer by buffer."""
    packs: Packs = []
    for begin in range(0, len(tokens), window):
        end = min(begin + window, len(tokens))
        packs += knapsack(tokens[begin:end], list(range(begin, end)), max_tokens)
    return packs


def fill_of(tokens: np.ndarray, packs: int, max_tokens: int) -> float:
    """Returns the share of the packs' positions that hold tokens."""
    return float(tokens.sum() / (packs * max_tokens))


def fill_table(options: argparse.Namespace, image: str, knapsack: Callable[..., Packs]) -> list[dict[str, Any]]:
    """Returns the fill of "ours" and the knapsack by buffer and pack size; the knapsack has no unlimited buffer."""
    from tqdm import tqdm

    from megatron_smar.data.packing import pack_flat

    tokens, tiles = draw(options.fill_samples, image)
    rows = []
    for window in tqdm(WINDOWS, desc=f"fill, image {image}"):
        for capacity in CAPACITIES:
            fits = tokens <= capacity
            kept, kept_tiles = tokens[fits], tiles[fits]
            packs = len(pack_flat(kept, kept_tiles, capacity, window=window)[1]) - 1
            row = {"image": image, "window": window, "max_tokens": capacity, "fill": fill_of(kept, packs, capacity)}
            if window:  # its time grows with the square of the buffer
                theirs = len(pack_knapsack(knapsack, kept.tolist(), capacity, window))
                row["fill_megatron"] = fill_of(kept, theirs, capacity)
            rows.append(row)
    return rows


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the wall-clock time of a call, and its result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def measure(options: argparse.Namespace, knapsack: Callable[..., Packs]) -> dict[str, Any]:
    """Measures speed and fill of all three packers on the same lists."""
    from tqdm import tqdm

    from megatron_smar.data.packing import pack

    tokens, tiles = draw(options.samples, options.image[0])
    fits = tokens <= options.max_tokens
    kept = tokens[fits]
    token_list, tile_list = kept.tolist(), tiles[fits].tolist()
    window, capacity = options.window, options.max_tokens
    runs: dict[str, Callable[[], Packs]] = {
        "ours": lambda: pack(token_list, tile_list, capacity, window=window),
        "Python": lambda: pack_python(token_list, tile_list, capacity, window=window),
        "Megatron": lambda: pack_knapsack(knapsack, token_list, capacity, window),
        "ours, all at once": lambda: pack(token_list, tile_list, capacity),
        "ours, limited tiles": lambda: pack(token_list, tile_list, capacity, options.max_tiles, window),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    packs: dict[str, int] = {}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        expected = None
        for name, run in runs.items():
            spent, result = seconds(run)
            times[name].append(spent)
            packs[name] = len(result)
            if name == "ours":
                expected = result
            elif name == "Python" and result != expected:
                sys.exit("The C++ packer and the plain Python one disagree: one of them is wrong.")
    return {
        "fill": fill_of(kept, packs["ours"], capacity),
        "samples_per_second": len(kept) / statistics.median(times["ours"]),
        "ratio_python": median_ratio(times["Python"], times["ours"]),
        "ratio_megatron": median_ratio(times["Megatron"], times["ours"]),
        "fill_megatron": fill_of(kept, packs["Megatron"], capacity),
        "rows": {
            name: {
                "fill": fill_of(kept, packs[name], capacity),
                "samples_per_second": len(kept) / statistics.median(times[name]),
                "seconds": statistics.median(times[name]),
            }
            for name in runs
        },
        "samples": len(kept),
        "mean_tokens": float(kept.mean()),
    }


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Returns the median over rounds of the ratio of their time to ours."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def print_tables(options: argparse.Namespace, result: dict[str, Any], fills: list[dict[str, Any]]) -> None:
    """Prints the results as tables."""
    source = f"the function in {options.megatron}" if options.megatron else "its algorithm, reimplemented"
    print("LLaVA-1.5's mixture, reconstructed from published numbers (listed in --help)")
    print(f"{result['samples']} samples, image {options.image[0]}, mean {result['mean_tokens']:.0f} tokens", end="; ")
    print(f"packs of {options.max_tokens}, buffers of {options.window}, {options.rounds} rounds; Megatron is {source}")
    print(f"  {'':38} {'fill %':>8} {'samples/s':>12} {'seconds':>9} {'x ours':>7}")
    labels = {"ours, limited tiles": f"ours, at most {options.max_tiles} tiles"}
    for name, row in result["rows"].items():
        ratio = {"Python": result["ratio_python"], "Megatron": result["ratio_megatron"]}.get(name)
        speed = f"{row['samples_per_second']:12,.0f} {row['seconds']:9.3f}"
        print(
            f"  {labels.get(name, name):38} {100 * row['fill']:8.2f} {speed} {'' if ratio is None else f'{ratio:7.1f}'}"
        )
    for image in options.image:
        print(f"fill %, image {image}: ours (Megatron); buffer by tokens of a pack, {options.fill_samples} samples")
        print(" " * 8 + "".join(f"{capacity:>16}" for capacity in CAPACITIES))
        for window in WINDOWS:
            row = [fill for fill in fills if fill["image"] == image and fill["window"] == window]
            cells = (
                f"{100 * cell['fill']:.2f}"
                + (f" ({100 * cell['fill_megatron']:.2f})" if "fill_megatron" in cell else " " * 8)
                for cell in row
            )
            print(f"{window or 'all':>8}" + "".join(f"{cell:>16}" for cell in cells))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", choices=("llava", "tile", "tiles"), default=["llava", "tile", "tiles"])
    parser.add_argument("--max-tokens", type=int, default=16384, help="Length of a pack. Default: %(default)s.")
    parser.add_argument(
        "--max-tiles", type=int, default=16, help="Tiles per pack in the row with limited tiles. Default: %(default)s."
    )
    parser.add_argument("--window", type=int, default=4000, help="Samples per buffer. Default: %(default)s.")
    parser.add_argument("--samples", type=int, help="Number of samples. Default: 1,000,000; 200,000 with --quick.")
    parser.add_argument("--rounds", type=int, help="Timed rounds. Default: 5; 3 with --quick.")
    parser.add_argument("--megatron", type=Path, metavar="PATH", help="Megatron-LM checkout whose function to run.")
    parser.add_argument("--quick", action="store_true", help="Fewer samples, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    options.samples = options.samples or (200_000 if options.quick else 1_000_000)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.fill_samples = min(options.samples, 40_000 if options.quick else 665_000)
    for name, least in (("max_tokens", LONGEST_TEXT), ("window", 1), ("samples", 1), ("rounds", 1), ("max_tiles", 13)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {getattr(options, name)} is too small: give {least} or more.")
    return options


def main() -> None:
    """Runs the benchmark and prints its results."""
    options = parse()
    try:
        knapsack = load_knapsack(options.megatron) if options.megatron else greedy_knapsack
    except ValueError as error:
        sys.exit(str(error))
    result = measure(options, knapsack)
    fills = [row for image in options.image for row in fill_table(options, image, knapsack)]
    print_tables(options, result, fills)
    if options.json:
        settings = {name: getattr(options, name) for name in ("max_tokens", "window", "rounds", "max_tiles")}
        megatron = str(options.megatron) if options.megatron else "reimplemented"
        print(json.dumps(result | settings | {"image": options.image[0], "megatron": megatron, "fills": fills}))


if __name__ == "__main__":
    main()
