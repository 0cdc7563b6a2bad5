# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of checkpoint conversion, compared with a plain copy of the same bytes and with transformers.

    python benchmarks/convert.py [--layers 3] [--folder DIR] [--quick] [--json]

A model of Mixtral 8x7B's shape with the given number of layers (3: 8.9 GB in bfloat16, random weights, a small vision
tower) is written once. Each job then runs in its own process, reads files that are not in the page cache, and ends when
its bytes are on the disk:

    copy          copies the model's files
    import        converts Hugging Face to torch_dist
    export        converts torch_dist to Hugging Face; the result must equal the original files bit by bit (checked)
    transformers  from_pretrained and save_pretrained, which hold the model in memory

A job's memory is its peak resident set minus that of the process before the job (the imports). It is reported in
multiples of the largest fused tensor: an expert's gate and up projection, or the embedding if that is larger.
`ratio_copy` is the speed of the slower of import and export divided by that of the copies around them;
`ratio_transformers` is the same divided by the speed of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smar import runtime

runtime.install()

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLVisionConfig,
    MixtralConfig,
)

from megatron_smar.checkpoint.safetensors_io import read_folder, write_folder
from megatron_smar.conversion import composite
from megatron_smar.conversion.empty_model import describe_model
from megatron_smar.conversion.exporter import export_model
from megatron_smar.conversion.importer import write_model
from megatron_smar.conversion.sources import read_composite
from megatron_smar.conversion.weights import inverted

ORDER = ("copy", "import", "copy", "export", "copy", "transformers")


def make_model(folder: Path, layers: int, **smaller: Any) -> tuple[int, int]:
    """Writes the synthetic model.

    Args:
        folder: Folder to write to.
        layers: Number of layers.
        **smaller: Sizes of MixtralConfig that differ from Mixtral 8x7B's.

    Returns:
        Bytes of all weights, and bytes of the largest fused tensor.
    """
    text = MixtralConfig(num_hidden_layers=layers, tie_word_embeddings=False, **smaller)
    vision = InternVLVisionConfig(num_hidden_layers=1)
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=31999, vision_feature_layer=-1, tie_word_embeddings=False
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    _, parts, _ = describe_model(config, composite.flags(config))
    fused = {name: list(part[0].global_shape[part[0].prepend_axis_num :]) for name, part in parts.items()}
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, pieces in inverted(composite.weights(config, biases=False)).items():
        shape = fused[pieces[0].name]
        if pieces[0].start is not None:
            shape = [sum(piece.length for piece in pieces), *shape[1:]]
        layout[name] = (tuple(shape), torch.bfloat16)
    noise = torch.randn(2 * 10**8).to(torch.bfloat16)

    def weight(name: str) -> Tensor:
        shape = layout[name][0]
        return noise[: torch.Size(shape).numel()].view(shape)

    write_folder(folder, layout, weight, lambda _: None)
    sizes = [2 * torch.Size(shape).numel() for shape in fused.values()]
    return sum(2 * torch.Size(shape).numel() for shape, _ in layout.values()), max(sizes)


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_job(job: str, model: Path, checkpoint: Path, output: Path) -> dict[str, float]:
    """Runs one job in this process and returns its seconds and its memory in bytes."""

    def with_transformers() -> None:
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16, trust_remote_code=False)
        loaded.save_pretrained(output, max_shard_size="5GB")

    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: shutil.copytree(model, output),
        "import": lambda: write_model(read_composite(model), output),
        "export": lambda: export_model(checkpoint, model, output),
        "transformers": with_transformers,
    }
    if job in ("import", "export"):  # warm up on a small model, so that lazy imports are not measured
        small, made, back = (model.parent / name for name in ("small", "small checkpoint", "small output"))
        write_model(read_composite(small), made)
        export_model(made, small, back)
        shutil.rmtree(made)
        shutil.rmtree(back)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = peak_memory(), time.perf_counter()
    jobs[job]()
    os.sync()
    return {"seconds": time.perf_counter() - began, "memory": peak_memory() - before}


def peak_memory() -> int:
    """Returns the peak resident set of this process in bytes; getrusage's value would start at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def same_weights(one: Path, other: Path) -> bool:
    """Returns whether two folders hold the same tensors, bit by bit."""
    mine, theirs = read_folder(one), read_folder(other)
    return set(mine) == set(theirs) and all(torch.equal(mine[name].read(), theirs[name].read()) for name in mine)


def measure(work: Path, layers: int, jobs: tuple[str, ...]) -> tuple[dict[str, list[dict[str, float]]], int, int]:
    """Runs the jobs one after another; returns their results, the model's bytes and those of its largest tensor."""
    model, checkpoint = work / "model", work / "checkpoint"
    total, largest = make_model(model, layers)
    make_model(work / "small", 1, hidden_size=64, intermediate_size=64, vocab_size=64, num_attention_heads=8)
    results: dict[str, list[dict[str, float]]] = {}
    for number, job in enumerate(jobs):
        output = checkpoint if job == "import" else work / f"output{number}"
        for folder in (model, checkpoint):
            forget(folder)
        print(f"{number + 1}/{len(jobs)} {job} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--job", job, str(model), str(checkpoint), str(output)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.setdefault(job, []).append(json.loads(done.stdout.splitlines()[-1]))
        if job == "export" and not same_weights(model, output):
            raise SystemExit("the export differs from what was imported")
        if job != "import":
            shutil.rmtree(output)
    return results, total, largest


def main() -> None:
    """Measures, and prints a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="folder for the files (four times the model's size). Default: a temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="one layer: a third of the size")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.job[0], *map(Path, args.job[1:]))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        results, total, largest = measure(Path(work), 1 if args.quick else args.layers, ORDER)
    speed = {job: statistics.median(total / 1e9 / run["seconds"] for run in runs) for job, runs in results.items()}
    memory = {job: max(run["memory"] for run in runs) / largest for job, runs in results.items()}
    print(f"\n{total / 1e9:.2f} GB, largest fused tensor {largest / 1e6:.0f} MB\n")
    print(f"{'job':14}{'GB/s':>8}{'memory / largest tensor':>26}")
    for job in dict.fromkeys(ORDER):
        print(f"{job:14}{speed[job]:8.2f}{memory[job]:26.2f}")
    ours = min(speed["import"], speed["export"])
    found = {
        "gigabytes": total / 1e9,
        "ratio_copy": ours / speed["copy"],
        "ratio_transformers": ours / speed["transformers"],
        "peak_over_largest": max(memory["import"], memory["export"]),
    }
    print("\n" + "   ".join(f"{name} {value:.3f}" for name, value in found.items()))
    if args.json:
        print(json.dumps(found | {"speed": speed, "memory": memory}))


if __name__ == "__main__":
    main()
