# SPDX-License-Identifier: Apache-2.0
"""Speed of the data pipeline, per stage and end to end, compared with a plain torch.utils.data pipeline.

    python benchmarks/data.py [--image-size 448] [--max-tiles 6] [--seq-length 4096] [--quick] [--json]
    python benchmarks/data.py --long [--samples 100000] [--quick] [--json]

With --long it measures whether speed and memory of loading stay constant over many samples; see long_run.py.

The data is generated at the start, in a temporary folder (mixture.py): records as in LLaVA-1.5's mixture (packing.py
lists the sources of its numbers; 6% have no image), with text from Python's own documentation and variants of one
photograph (cropped, mirrored, recolored, with grain) in the image sizes of the mixture's sources, one in 25 as PNG, the
others as JPEG. A SentencePiece model is trained on the text. tools/data/prepare.py writes the shards.

Two pipelines are compared, which read the same records and images with the same number of workers:

    ours    the pipeline of training: energon, the task encoder with packing, uint8 tiles to the training process
    torch   torch.utils.data.DataLoader and Pillow, as usually written (below in this file): JSON and image files,
            InternVL's dynamic_preprocess and collator, float tiles, padded batches of as many samples as a pack holds

Both end with normalized float32 tiles in the training process; the time of "ours" includes the normalization there.
Before the measurement every sample goes through both pipelines, which must give the same tokens, mask and tiles. Pixels
may differ by two gray levels, since torch and Pillow round differently, and one pixel in a thousand by more: the two
libraries resize the axes in a different order, and clip values beyond white or black after the first axis.

The stages are measured in one process, in CPU time. The full pipelines are measured in wall-clock time, in turns; their
workers are warmed up, prefetched batches are consumed before the clock starts, and the workers of the other pipelines
are idle. `ratio_torch` is the median over rounds of the samples per second of "ours" divided by those of "torch", with
one worker. `ratio_limit` compares "delivered", which is "ours" without the normalization, a part of the model that runs
on its device, with "alone": workers that decode and tile the same pictures with the same libraries, without tokens,
batches, or anything for the training process (pictures_alone.py). The gain from a second worker depends on the number
of cores: the training process, which here normalizes without a GPU, needs a core for itself ("busy" is the share of the
time in which it computes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when the libraries are loaded
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from megatron_smar import runtime

runtime.install_or_exit("cpu")  # as in training
warnings.filterwarnings("ignore", message=".*(Transformer Engine|dynamic_context|not writable|pin_memory)")

import numpy as np
import torch
from long_run import make_long_data, print_long, run_long
from megatron.core.tokenizers import MegatronTokenizer
from megatron.energon import Cooker, TaskEncoder, WorkerConfig, get_loader, get_val_dataset
from mixture import make_data
from packing import LONGEST_TEXT
from pictures_alone import PicturesAlone, decoded_pictures
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from megatron_smar.data import (
    ConversationTaskEncoder,
    DataConfig,
    EnergonIterator,
    ImageConfig,
    build_train_loader,
)
from megatron_smar.data.batch import EncodedSample, TokenizedSample
from megatron_smar.data.conversations import get_template, record_segments, tokenize_segments
from megatron_smar.data.images import read_image
from megatron_smar.data.rejects import RejectLog
from megatron_smar.data.task_encoder import RawSample, cook
from megatron_smar.data.tokens import TextEncoder
from megatron_smar.model.vision import NORMALIZATION, normalize

MEAN, STD = NORMALIZATION["internvl_vision"]
PREFETCH = 2  # batches per worker: torch's default, and energon's
WORKERS = (1, 2)
UNITS = ("samples", "tokens", "tiles")
STAGES = ("raw reading", "tokenising", "packing", "decoding", "tiling", "batching")  # in a worker


def load_encoder(folder: Path) -> tuple[Any, TextEncoder]:
    """Loads the tokenizer like Megatron for --tokenizer-type SentencePieceTokenizer; returns it and a TextEncoder."""
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder / "tokenizer.model"),
        metadata_path={"library": "sentencepiece"},
        chat_template=None,
        ignore_extra_whitespaces=True,
        legacy=False,
        special_tokens=None,
    )
    return tokenizer, TextEncoder(tokenizer)


# ---- a plain pipeline, from parts that most torch programs use


def dynamic_preprocess(image: Image.Image, side: int, max_tiles: int) -> list[Image.Image]:
    """Splits an image into tiles and a thumbnail, with InternVL's algorithm as published in its model card."""
    wide, high = image.size
    grids = sorted(
        {(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles},
        key=lambda grid: grid[0] * grid[1],
    )
    best, best_difference = (1, 1), float("inf")
    for grid in grids:
        difference = abs(wide / high - grid[0] / grid[1])
        if difference < best_difference:
            best, best_difference = grid, difference
        elif difference == best_difference and wide * high > 0.5 * side * side * grid[0] * grid[1]:
            best = grid
    columns, rows = best
    canvas = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    corners = [(side * column, side * row) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


class PlainDataset(Dataset[dict[str, torch.Tensor]]):
    """A JSON file and a folder of images; template, tokens and mask come from the same functions as in "ours"."""

    def __init__(self, folder: Path, config: DataConfig, encoder: TextEncoder) -> None:
        self.folder = folder
        self.config = config
        self.encoder = encoder
        self.records = json.loads((folder / "train.json").read_text())
        self.template = get_template(config.template)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        image_config = self.config.image
        tiles: list[torch.Tensor] = []
        if "image" in record:
            image = Image.open(self.folder / record["image"]).convert("RGB")
            tiles = [
                self.transform(tile)
                for tile in dynamic_preprocess(image, image_config.image_size, image_config.max_tiles)
            ]
        lengths = [self.config.tokens_per_tile * len(tiles)] if tiles else []
        segments = record_segments(record, self.template, len(lengths))
        ids, targets = tokenize_segments(segments, self.encoder, lengths)
        side = image_config.image_size
        return {
            "input_ids": torch.tensor(ids[:-1]),
            "labels": torch.tensor(ids[1:]),
            "loss_mask": torch.tensor(targets[1:], dtype=torch.float32),
            "pixel_values": torch.stack(tiles) if tiles else torch.empty(0, 3, side, side),
        }

    def transform(self, tile: Image.Image) -> torch.Tensor:
        """Returns a normalized float tile [3, H, W], like torchvision's ToTensor and Normalize."""
        return (
            torch.from_numpy(np.array(tile))
            .permute(2, 0, 1)
            .contiguous()
            .float()
            .div_(255)
            .sub_(self.mean)
            .div_(self.std)
        )

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pads the samples to the longest."""
        pad = torch.nn.utils.rnn.pad_sequence
        padding = {"input_ids": self.encoder.pad_id, "labels": self.encoder.pad_id, "loss_mask": 0}
        batch = {
            name: pad([sample[name] for sample in samples], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        batch["lengths"] = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
        return batch


# ---- the two pipelines, as the training process sees them


def our_batches(config: DataConfig, tokenizer: Any, workers: int, *, normalized: bool = True) -> Iterator[Counter[str]]:
    """Loads micro-batches of "ours" endlessly, and normalizes them if wanted; yields the counts of each."""
    config = dataclasses.replace(config, num_workers=workers)
    loader = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
    try:
        for batch in loader:
            pixels = normalize(batch.pixel_values, MEAN, STD) if normalized else batch.pixel_values
            yield Counter(samples=len(batch.__key__), tokens=int((~batch.padding_mask).sum()), tiles=len(pixels))
    finally:
        loader.close()


def plain_batches(dataset: PlainDataset, batch_size: int, workers: int) -> Iterator[Counter[str]]:
    """Loads batches of "torch" endlessly, without a pause between epochs; yields the counts of each."""
    order = RandomSampler(dataset, num_samples=1_000_000, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, collate_fn=dataset.collate, prefetch_factor=PREFETCH
    )
    for batch in loader:
        tokens, tiles = int(batch["lengths"].sum()), len(batch["pixel_values"])
        yield Counter(samples=len(batch["lengths"]), tokens=tokens, tiles=tiles)


def measure(batches: Iterator[Counter[str]], workers: int, samples: int) -> dict[str, float]:
    """Returns samples, tokens and tiles per second over at least `samples` samples, and this process's busy share."""
    for _ in range((PREFETCH + 1) * workers):
        next(batches)
    done: Counter[str] = Counter()
    begin, begin_busy = time.perf_counter(), time.process_time()
    while done["samples"] < samples:
        done += next(batches)
    seconds, busy = time.perf_counter() - begin, time.process_time() - begin_busy
    return {unit: done[unit] / seconds for unit in UNITS} | {"busy": busy / seconds}


def compare(
    pipelines: dict[str, Iterator[Counter[str]]], workers: int, options: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Measures the pipelines in turns and returns their speeds."""
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for batches in pipelines.values():
        for _ in range(4 * workers):
            next(batches)
    for turn in range(options.rounds):
        for name in pipelines if turn % 2 == 0 else reversed(pipelines):
            speeds[name].append(measure(pipelines[name], workers, options.samples_per_turn))
        bar.update()
    for batches in pipelines.values():
        batches.close()  # type: ignore[attr-defined]
    return summarise(speeds)


def summarise(speeds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the medians over rounds, and the quartiles of the ratios."""
    summary: dict[str, Any] = {
        name: {unit: statistics.median(speed[unit] for speed in turns) for unit in turns[0]}
        for name, turns in speeds.items()
    }
    for name, one, other, unit in (
        ("ratio_samples", "ours", "torch", "samples"),
        ("ratio_tiles", "ours", "torch", "tiles"),
        ("ratio_limit", "delivered", "alone", "tiles"),
    ):
        ratios = [first[unit] / second[unit] for first, second in zip(speeds[one], speeds[other], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        summary[name] = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
    return summary


# ---- stages, in this process


class RawEncoder(TaskEncoder):
    """Reads samples and does nothing with them."""

    cookers = (Cooker(cook),)
    decoder = None


class Stages:
    """Measures CPU seconds of each stage over all samples, and checks that both pipelines give equal samples.

    Args:
        config: Data configuration.
        encoder: Encoder of text to ids.
        dataset: Dataset of the plain pipeline.
    """

    def __init__(self, config: DataConfig, encoder: TextEncoder, dataset: PlainDataset) -> None:
        self.config = config
        self.dataset = dataset
        self.encoder = ConversationTaskEncoder(config, encoder, RejectLog("benchmark", config.data_path))
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.plain_counts: Counter[str] = Counter()
        self.far_pixels = 0

    def run(self) -> None:
        """Runs all stages, pack by pack.

        Raises:
            SystemExit: The two pipelines give different samples.
        """
        workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
        shards = get_val_dataset(
            self.config.data_path, split_part="train", worker_config=workers, batch_size=None, task_encoder=RawEncoder()
        )
        reader = iter(get_loader(shards))
        raw: list[RawSample] = [next(reader)]  # not timed: starting the reader takes longer than reading
        raw += self._timed("raw reading", list, reader)
        self.seconds["raw reading"] *= len(raw) / (len(raw) - 1)
        records = {sample.__key__: json.loads(sample.parts["json"]) for sample in raw}
        tokenized = [self._timed("tokenising", self.encoder.preencode_sample, sample) for sample in raw]
        packs: list[list[TokenizedSample]] = []
        size = self.config.packing_buffer_size or len(raw)
        for begin in range(0, len(raw), size):
            packs += self._timed("packing", self.encoder.select_samples_to_pack, tokenized[begin : begin + size])
        self.counts["packs"] = len(packs)
        for pack in tqdm(packs, desc="stages", disable=None):
            encoded = [self._decode(sample) for sample in pack]
            row = self.encoder.pack_selected_samples(encoded)
            batch = self._timed("batching", self.encoder.batch, [row])
            self._timed("normalizing", normalize, batch.pixel_values, MEAN, STD)
            for sample in encoded:
                self._compare(records[sample.__key__], sample)
        if self.counts["samples"] != len(self.dataset):
            sys.exit(f"{self.counts['samples']} samples came out of the shards, but {len(self.dataset)} went in.")

    def rates(self) -> dict[str, dict[str, float]]:
        """Returns for each stage samples, tokens and tiles per second, and its share of a worker's time."""
        total = sum(self.seconds[name] for name in STAGES)
        seconds = {name: self.seconds[name] for name in STAGES}
        seconds |= {"a worker's stages": total, "normalizing": self.seconds["normalizing"]}
        return {
            name: {unit: self.counts[unit] / spent for unit in UNITS} | {"share": spent / total}
            for name, spent in seconds.items()
        }

    def _decode(self, sample: TokenizedSample) -> EncodedSample:
        before = self.seconds["decoding"]
        for file in sample.files:
            self._timed("decoding", read_image, file)
        encoded = self._timed("tiling", self.encoder.postencode_sample, sample)
        self.seconds["tiling"] -= self.seconds["decoding"] - before  # postencode_sample decoded the image again
        return encoded

    def _timed(self, stage: str, run: Callable[..., Any], *given: Any) -> Any:
        begin = time.process_time()
        result = run(*given)
        self.seconds[stage] += time.process_time() - begin
        return result

    def _compare(self, record: dict[str, Any], ours: EncodedSample) -> None:
        theirs = self.dataset[int(record["id"])]
        for name in ("input_ids", "labels", "loss_mask"):
            if not torch.equal(getattr(ours, name), theirs[name]):
                sys.exit(f"The two pipelines give sample {record['id']} different {name}.")
        self.counts.update(samples=1, tokens=len(ours.input_ids), tiles=len(ours.pixel_values))
        self.plain_counts.update(samples=1, tokens=len(theirs["input_ids"]), tiles=len(theirs["pixel_values"]))
        if ours.pixel_values.shape != theirs["pixel_values"].shape:
            sys.exit(f"The two pipelines give sample {record['id']} different tiles.")
        levels = (normalize(ours.pixel_values, MEAN, STD) - theirs["pixel_values"]).mul_(self.dataset.std * 255).abs_()
        self.far_pixels += int((levels > 2.01).sum())
        if self.far_pixels > 1e-3 * self.counts["tiles"] * self.config.image.image_size**2 * 3:
            sys.exit(f"The two pipelines give samples, the last {record['id']}, different pixels.")


# ---- the program


def print_tables(result: dict[str, Any]) -> None:
    """Prints the results."""
    counts, far = result["counts"], 1e6 * result["far_pixels_share"]
    print("the same in both pipelines: " + ", ".join(f"{counts[unit]:,} {unit}" for unit in UNITS), end="; ")
    print(f"{far:.1f} of a million pixels more than 2 grey levels apart")
    print(f"packs: {counts['packs']}; a plain batch has {result['batch_size']} samples")
    print(f"{'stage, in one process':34}{'samples/s':>12}{'tokens/s':>12}{'tiles/s':>12}{'share %':>10}")
    for name, stage in result["stages"].items():
        speeds = "".join(f"{stage[unit]:12,.0f}" for unit in UNITS)
        print(f"{name:34}{speeds}{100 * stage['share']:10.1f}")
    print(f"the limit is {result['limit']}; normalizing runs in the training process, in parallel to the workers")
    print(f"{'full pipeline':34}{'samples/s':>12}{'tokens/s':>12}{'tiles/s':>12}{'busy %':>10}{'ratio':>8}  quartiles")
    for workers, row in result["workers"].items():
        ratio, (low, high) = row["ratio_samples"]["median"], row["ratio_samples"]["quartiles"]
        limit, (least, most) = row["ratio_limit"]["median"], row["ratio_limit"]["quartiles"]
        ends = {"ours": "", "torch": f"{ratio:8.2f}  {low:.2f}..{high:.2f}", "delivered": ""}
        for name, end in (ends | {"alone": f"{limit:8.2f}  {least:.2f}..{most:.2f}"}).items():
            speeds = "".join(f"{row[name][unit]:12,.1f}" for unit in UNITS)
            print(f"{f'{name}, {workers} worker(s)':34}{speeds}{100 * row[name]['busy']:10.0f}{end}")
    growth = result["growth"]
    print(f"from 1 to 2 workers: ours x{growth['ours']:.2f}, torch x{growth['torch']:.2f} ({os.cpu_count()} cores)")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image-size", type=int, default=448, help="Side of a tile. Default: %(default)s.")
    add("--max-tiles", type=int, default=6, help="Most tiles per image, without its thumbnail. Default: %(default)s.")
    add("--seq-length", type=int, default=4096, help="Length of a pack in tokens. Default: %(default)s.")
    add("--packing-buffer-size", type=int, default=100, help="Samples per packing buffer. Default: %(default)s.")
    add("--long", action="store_true", help="Read --samples samples, and compare the end with the beginning.")
    add("--samples", type=int, help="Size of the data. Default: 300, --quick 60; --long: 100,000, --quick 10,000.")
    add("--samples-per-turn", type=int, help="Fewest samples in a timed turn. Default: 150; 40 with --quick.")
    add("--rounds", type=int, help="Pairs of turns for each number of workers. Default: 8; 2 with --quick.")
    add("--quick", action="store_true", help="Fewer samples and turns, within a minute.")
    add("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    samples = (100_000, 10_000) if options.long else (300, 60)
    for name, usual, quick in (("samples", *samples), ("samples_per_turn", 150, 40), ("rounds", 8, 2)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    least = {"rounds": 2, "samples": 20, "samples_per_turn": 1, "packing_buffer_size": 1, "max_tiles": 2}
    for name, value in least.items():
        if getattr(options, name) < value:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is too small: give {value} or more.")
    if options.image_size < 28 or options.image_size % 28:
        parser.error(f"--image-size {options.image_size} is not a multiple of 28, a vision token's side: give 448.")
    longest = LONGEST_TEXT + (options.max_tiles + 1) * tokens_per_tile(options.image_size)
    if options.seq_length < longest:
        parser.error(f"--seq-length {options.seq_length} is too short for the longest sample: give {longest} or more.")
    return options


def tokens_per_tile(image_size: int) -> int:
    """Returns InternViT's tokens per tile: patches of 14 x 14 pixels, four of which become one token."""
    return (image_size // 28) ** 2


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Generates the data and runs the measurements."""
    make_data(folder, options.samples)
    tokenizer, encoder = load_encoder(folder)
    config = DataConfig(
        data_path=str(folder / "shards"),
        seq_length=options.seq_length,
        micro_batch_size=1,
        tokens_per_tile=tokens_per_tile(options.image_size),
        image=ImageConfig(options.image_size, max_tiles=options.max_tiles, use_thumbnail=True),
        packing_buffer_size=options.packing_buffer_size,
        shuffle_buffer_size=100,
    )
    dataset = PlainDataset(folder, config, encoder)
    stages = Stages(config, encoder, dataset)
    stages.run()
    batch_size = max(1, round(stages.counts["samples"] / stages.counts["packs"]))
    files = [[(folder / record["image"]).read_bytes()] if "image" in record else [] for record in dataset.records]
    pictures = PicturesAlone(files, config.image)
    workers = {}
    with tqdm(total=len(WORKERS) * options.rounds, desc="rounds", disable=None) as bar:
        for number in WORKERS:
            ours, theirs = our_batches(config, tokenizer, number), plain_batches(dataset, batch_size, number)
            alone = decoded_pictures(pictures, batch_size, number, PREFETCH)
            delivered = our_batches(config, tokenizer, number, normalized=False)
            pipelines = {"ours": ours, "torch": theirs, "delivered": delivered, "alone": alone}
            workers[number] = compare(pipelines, number, options, bar)
    return {
        "ratio_torch": workers[1]["ratio_samples"]["median"],
        "ratio_limit": {number: row["ratio_limit"]["median"] for number, row in workers.items()},
        "samples_per_second": workers[1]["ours"]["samples"],
        "workers": workers,
        "growth": {name: workers[2][name]["samples"] / workers[1][name]["samples"] for name in ("ours", "torch")},
        "stages": stages.rates(),
        "limit": max(STAGES, key=lambda name: stages.seconds[name]),
        "counts": dict(stages.counts),
        "counts_torch": dict(stages.plain_counts),
        "far_pixels_share": stages.far_pixels / (stages.counts["tiles"] * 3 * options.image_size**2),
        "batch_size": batch_size,
    }


def main() -> None:
    """Runs the benchmark and prints its results."""
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="smar-data-benchmark-") as name:
        folder = Path(name)
        if options.long:
            data = make_long_data(folder)
            result = run_long(folder, load_encoder(folder)[0], data, options.samples)
            print_long(result)
        else:
            result = run(options, folder)
            print_tables(result)
    if options.json:
        print(json.dumps(result | {"options": vars(options)}))


if __name__ == "__main__":
    main()
