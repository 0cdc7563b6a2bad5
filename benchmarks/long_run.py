# SPDX-License-Identifier: Apache-2.0
"""Measures whether speed and memory of loading stay constant over many samples: benchmarks/data.py --long.

The samples are small, so that memory growth shows what a run retains of each sample rather than its pixels. Two sources
of records, with images of 32 pixels or none, are blended 0.7 to 0.3 and read repeatedly; one sample in 50 is too long
and is rejected, each sample is recorded as by --record-samples, and the loader's state is saved every 2,000 samples.
Three loaders are measured one after another: in the training process, with a worker, and packed with a worker.

Time is the CPU time of the training process and the worker, so that other programs on the machine matter less; memory
is the sum of both. `slowdown` is the time of the last tenth of the samples divided by that of the first.
`megabytes_per_million` is the slope of a line fitted to the memory after each tenth, from the third on, when buffers
are full. The worst of the three loaders is reported.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import PREPARE, read_text, train_tokenizer  # benchmarks/mixture.py
from PIL import Image
from tqdm import tqdm

from megatron_smar.data import DataConfig, EnergonIterator, ImageConfig, build_train_loader
from megatron_smar.data.sample_log import RecordedSamples
from megatron_smar.runtime.environment import detect_environment
from megatron_smar.runtime.repairs import forget_members_that_were_read

TENTHS = 10
SAVE_EVERY = 2000  # samples
MODES: dict[str, dict[str, Any]] = {
    "no worker": {"num_workers": 0, "micro_batch_size": 8},
    "a worker": {"num_workers": 1, "micro_batch_size": 8},
    "a worker, packed": {"num_workers": 1, "micro_batch_size": 1, "packing_buffer_size": 100},
}


def make_long_data(folder: Path, samples: int = 1000) -> Path:
    """Writes the shards of the two sources, tokenizer.model and the blend; returns the blend's path."""
    text = read_text()
    train_tokenizer(text, folder / "tokenizer.model")
    words = text.split()
    random = np.random.default_rng(1)
    for source in ("pictures", "mixed"):
        records = []
        for number in range(samples):
            start = int(random.integers(len(words) - 600))
            answer = " ".join(words[start : start + (500 if number % 50 == 0 else 12)])
            question = "What is it?"
            record: dict[str, Any] = {"id": str(number)}
            if source == "pictures" or number % 3:
                record["image"] = f"{source}-{number}.png"
                question = f"<image>\n{question}"
                pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(stream := io.BytesIO(), format="PNG")
                (folder / record["image"]).write_bytes(stream.getvalue())
            record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            records.append(record)
        (folder / f"{source}.json").write_text(json.dumps(records))
        command = [sys.executable, PREPARE, "--train", folder / f"{source}.json", "--image-root", folder]
        done = subprocess.run(
            [*map(str, command), "--output", str(folder / source), "--samples-per-shard", "200"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"tools/data/prepare.py failed:\n{done.stdout}")
    blend = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
    blend += "".join(
        f"      - {{path: ./{name}, weight: {weight}}}\n" for name, weight in (("pictures", 0.7), ("mixed", 0.3))
    )
    (folder / "data.yaml").write_text(blend)
    return folder / "data.yaml"


def run_long(folder: Path, tokenizer: Any, data: Path, samples: int) -> dict[str, Any]:
    """Reads `samples` samples with each loader; returns the worst figures, and the results of each loader."""
    forget_members_that_were_read(detect_environment("cpu"))  # as every program does when it starts
    modes = {}
    for number, (name, settings) in enumerate(MODES.items()):
        config = DataConfig(
            data_path=str(data),
            seq_length=256,
            tokens_per_tile=4,
            image=ImageConfig(image_size=32),
            shuffle_buffer_size=100,
            rejects_dir=str(folder / f"rejects{number}"),
            **settings,
        )
        with tqdm(total=samples, desc=name, unit=" samples", disable=None) as bar:
            modes[name] = measure_mode(config, tokenizer, folder / f"recorded{number}", samples, bar)
    return {
        "slowdown": max(mode["slowdown"] for mode in modes.values()),
        "megabytes_per_million": max(mode["megabytes_per_million"] for mode in modes.values()),
        "samples": samples,
        "modes": modes,
    }


def measure_mode(config: DataConfig, tokenizer: Any, recorded: Path, samples: int, bar: Any) -> dict[str, Any]:
    """Reads `samples` samples; returns samples per second of CPU time, and megabytes after each tenth of them."""
    loader = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
    step = 0
    iterator = RecordedSamples(loader, recorded, 0, 1, 0, lambda: step)
    done = saved = 0
    for _ in range(100):  # until the worker has started and buffers are full
        next(iterator)
    tenths: list[dict[str, float]] = []
    begin_wall = time.perf_counter()
    for tenth in range(TENTHS):
        begin, before = processor_seconds(), done
        while done < samples * (tenth + 1) // TENTHS:
            read = len(next(iterator).__key__)
            step, done = step + 1, done + read
            bar.update(read)
            if done - saved >= SAVE_EVERY:
                torch.save(loader.save_state(), io.BytesIO())
                saved = done
        spent = processor_seconds() - begin
        tenths.append({"samples_per_second": (done - before) / spent, "megabytes": megabytes(), "samples": done})
    wall = time.perf_counter() - begin_wall
    loader.close()
    settled = tenths[2:]
    slope = np.polyfit([tenth["samples"] for tenth in settled], [tenth["megabytes"] for tenth in settled], 1)[0]
    return {
        "slowdown": tenths[0]["samples_per_second"] / tenths[-1]["samples_per_second"],
        "megabytes_per_million": float(slope) * 1e6,
        "samples_per_second": done / wall,
        "tenths": tenths,
    }


def processes() -> list[int]:
    """Returns the ids of this process and its data workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def processor_seconds() -> float:
    """Returns the CPU time of this process and its data workers."""
    ticks = 0
    for process in processes():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user time and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def megabytes() -> float:
    """Returns the memory of this process and its data workers; shared pages are counted for each."""
    pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes())
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def print_long(result: dict[str, Any]) -> None:
    """Prints a line for each tenth of the samples, then a line of figures for each loader."""
    modes = result["modes"]
    print(f"{'samples':>10}" + "".join(f"{name:>28}" for name in modes))
    print(f"{'':10}" + f"{'samples/s (CPU)':>18}{'MB':>10}" * len(modes))
    for tenth in range(TENTHS):
        rows = [mode["tenths"][tenth] for mode in modes.values()]
        speeds = "".join(f"{row['samples_per_second']:18,.0f}{row['megabytes']:10,.1f}" for row in rows)
        print(f"{result['samples'] * (tenth + 1) // TENTHS:10,}{speeds}")
    for name, mode in modes.items():
        print(
            f"{name}: slowdown {mode['slowdown']:.3f}, {mode['megabytes_per_million']:.1f} MB per million samples, "
            f"{mode['samples_per_second']:,.0f} samples/s"
        )
