# SPDX-License-Identifier: Apache-2.0
"""What saving and verifying checkpoints costs: how long training stops, and how long a start verifies.

    python benchmarks/checkpoint_saves.py [--write docs/reliability.md]

Trains a model whose checkpoint has about a gigabyte, once with synchronous and once with asynchronous saves. Times are
those that the run prints; the first save is left out, since it touches its memory for the first time. Then the run is
resumed once for each --verify-checkpoint. The last row writes the largest file of the checkpoint again, with and
without hashes. All times are of one machine and one run; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mixture import make_data  # benchmarks/mixture.py
from routed_training import IMAGE_SIZE, save_vision_model  # benchmarks/routed_training.py

from megatron_smar.reliability.manifest import HashingFile

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by benchmarks/checkpoint_saves.py -->", "<!-- end of the table -->"
MODEL = f"""
    --image-size {IMAGE_SIZE} --num-layers 2 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 8
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 256
    --max-position-embeddings 256 --seed 7 --micro-batch-size 1 --global-batch-size 2 --num-workers 0 --eval-iters 0
    --lr 1e-4 --lr-decay-style constant --log-interval 1 --save-interval 8 --keep-last 2 --modality-routing smar
    --max-skip-ratio 1
""".split()


def train(folder: Path, save: Path, steps: int, *flags: str) -> str:
    """Runs pretrain_vlm.py and returns what it prints."""
    data = ["--data-path", folder / "data/shards", "--tokenizer-model", folder / "data/tokenizer.model"]
    data += ["--tokenizer-type", "SentencePieceTokenizer", "--vision-model", folder / "vision"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["pretrain_vlm.py", *MODEL, *map(str, data), "--save", str(save), "--load", str(save)]
    environment = {"OMP_NUM_THREADS": "1", "MEGATRON_SMAR_DEVICE": "cpu", "PYTHONPATH": str(ROOT)} | dict(os.environ)
    done = subprocess.run(
        [*command, "--train-iters", str(steps), *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"pretrain_vlm.py failed:\n{done.stdout[-3000:]}")
    return done.stdout


def stops(said: str) -> list[float]:
    """Returns how long training stopped for each save, without the first and, where it ends the run, the last."""
    return [float(seconds) for seconds in re.findall(r"training stopped ([\d.]+) s", said)][1:-1]


def seconds_of(operation: Callable[[], object], times: int = 3) -> float:
    """Returns the median duration of an operation."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        operation()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def write(path: Path, content: bytes, hashes: bool) -> None:
    """Writes a file as a save does."""
    with HashingFile(path, []) if hashes else path.open("wb") as file:
        for begin in range(0, len(content), 1 << 20):
            file.write(memoryview(content)[begin : begin + (1 << 20)])
        os.fsync(file.fileno())


def measure(folder: Path) -> list[tuple[str, str]]:
    """Returns the rows of the table: what was measured, and the result."""
    (folder / "data").mkdir()
    make_data(folder / "data", 64)
    save_vision_model(str(folder / "vision"))
    steps = 32  # a save has ended before the next begins
    plain = train(folder, folder / "plain", steps)
    staged = train(folder, folder / "staged", steps, "--async-save")
    step = f"iter_{steps:07d}"
    files = {kind: folder / kind / step / "__0_0.distcp" for kind in ("plain", "staged")}
    size = sum(file.stat().st_size for file in files["plain"].parent.iterdir())
    synchronous, asynchronous = statistics.median(stops(plain)), statistics.median(stops(staged))
    rows = [
        ("a checkpoint, of one rank", f"{size / 1e9:.2f} GB"),
        ("a synchronous save stops training for", f"{synchronous:.2f} s"),
        ("an asynchronous save stops training for", f"{asynchronous:.3f} s, {asynchronous / synchronous:.1%} of it"),
    ]
    for how in ("full", "sampled"):
        said = train(folder, folder / "plain", steps + 1, "--verify-checkpoint", how)
        found = re.search(r"undamaged: .* verified in ([\d.]+) s", said)
        assert found is not None, said
        rows.append((f"`--verify-checkpoint {how}` takes", f"{float(found[1]):.1f} s"))
    content = files["plain"].read_bytes()
    with_hashes, without = (seconds_of(partial(write, folder / "again", content, hashes)) for hashes in (True, False))
    rows.append(("writing with hashes takes", f"{with_hashes / without:.2f} times as long as without"))
    return rows


def main() -> None:
    """Prints the table, and writes it with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between its marks in this document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    table = "\n".join(["| | |", "|---|---|", *(f"| {what} | {result} |" for what, result in rows)])
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
