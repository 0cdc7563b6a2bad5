# SPDX-License-Identifier: Apache-2.0
"""Speed-up from sharing the frozen vision encoder's work between data-parallel replicas (--balance-vision).

    python benchmarks/vision_balance.py [--ranks 2] [--pairs 40] [--quick] [--json]

Real training steps on replicas (the program starts itself under torchrun, one thread each) whose samples have the tiles
of LLaVA-1.5's mixture under InternVL's tiling, 0 to 13 of them. The mixture is RECONSTRUCTED, see packing.py. Steps
with and without balancing alternate on the same batch, in a model in which the encoder takes most of the step. The
result is the ratio of the total times, with the quartiles of the pairs; the same where every replica has seven tiles,
which shows what balancing costs where there is nothing to gain. The table after it is simulated, not run: the tiles of
the replica that has most, relative to the mean, which is what a vision-bound step loses. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from packing import draw  # benchmarks/packing.py
from routed_training import IMAGE_TOKEN, TOKENS_PER_TILE, Shape, Training  # benchmarks/routed_training.py

SIDE, PATCH, MOST_TILES, EVEN = 112, 14, 13, 7
SHAPE = Shape(128, 256, 1, MOST_TILES * TOKENS_PER_TILE + 48, 1, 512, triples=0, quick_triples=0, heads=4, groups=2)
SIMULATED = (8, 64, 512)
MICRO_BATCHES = (1, 2, 4)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="Processes, each a replica. Default: %(default)s.")
    parser.add_argument("--hidden", type=int, default=256, help="The encoder's width. Default: %(default)s.")
    parser.add_argument("--layers", type=int, default=6, help="The encoder's layers. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, help="Pairs of steps. Default: 40, with --quick 4.")
    parser.add_argument("--quick", action="store_true", help="Few pairs, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    options.pairs = options.pairs or (4 if options.quick else 40)
    for name in ("ranks", "pairs"):
        if getattr(options, name) < 2:
            parser.error(f"--{name} {getattr(options, name)} leaves nothing to compare; give 2 or more.")
    if 8 % options.ranks:
        parser.error(f"--ranks {options.ranks} cannot share the model's 8 experts; give 2, 4 or 8.")
    if options.hidden % 64:
        parser.error(f"--hidden {options.hidden} must be a multiple of 64, the size of an attention head.")
    return options


def simulated() -> list[tuple[int, int, float, float]]:
    """Returns for numbers of replicas and samples: the most tiles of a replica relative to the mean, then balanced."""
    tiles = draw(400_000, "tiles")[1]
    rows = []
    for replicas in SIMULATED:
        for samples in MICRO_BATCHES:
            steps = (
                tiles[: len(tiles) // (replicas * samples) * replicas * samples].reshape(-1, replicas, samples).sum(2)
            )
            mean = steps.mean(1)
            rows.append((replicas, samples, float((steps.max(1) / mean).mean()), float((np.ceil(mean) / mean).mean())))
    return rows


def save_tower(folder: str, hidden: int, layers: int) -> None:
    """Saves the vision encoder."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "num_hidden_layers": layers}
    sizes |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    InternVLVisionModel(InternVLVisionConfig(**sizes)).save_pretrained(folder)


def batch_of(tiles: int, seed: int) -> Any:
    """Returns a micro-batch of one sample with tiles, and text up to the same length."""
    import torch

    from megatron_smar.data.batch import VisionLanguageBatch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, SHAPE.vocabulary, (1, SHAPE.seq_length), generator=generator)
    ids[:, 1 : 1 + tiles * TOKENS_PER_TILE] = IMAGE_TOKEN
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return VisionLanguageBatch(
        __key__=[str(seed)],
        __restore_key__=(),
        input_ids=ids,
        labels=labels,
        loss_mask=(labels != IMAGE_TOKEN).float(),
        padding_mask=torch.zeros_like(ids, dtype=torch.bool),
        pixel_values=torch.randint(256, (tiles, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
    )


class Pairs:
    """Steps with and without balancing, on the same batches."""

    def __init__(self, ranks: int, folder: str) -> None:
        self.batch: Any = None
        flags = ["--image-size", str(SIDE), "--balance-vision"]
        self.training = Training(SHAPE, ranks, folder, False, "smar", flags, read=lambda: self.batch)
        self.exchange = self.training.models[0]._exchange

    def seconds(self, balanced: bool) -> float:
        """Returns the time of a step until the slowest rank has finished."""
        import torch

        self.training.models[0]._exchange = self.exchange if balanced else None
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.training.step()
        torch.cuda.synchronize()
        torch.distributed.barrier()
        return time.perf_counter() - begin

    def ratio(self, tiles: np.ndarray[Any, Any], rank: int) -> tuple[float, list[float]]:
        """Returns the ratio of the total times without and with balancing, and its quartiles over pairs.

        Args:
            tiles: Tiles of each pair's step and rank, [pairs, ranks].
            rank: This rank.
        """
        times = []
        for number, counts in enumerate(tiles):
            self.batch = batch_of(int(counts[rank]), seed=100 * number + rank)
            order = (False, True) if number % 2 else (True, False)
            found = {balanced: self.seconds(balanced) for balanced in order}
            times.append((found[False], found[True]))
        without, with_it = map(sum, zip(*times, strict=True))
        quartiles = statistics.quantiles([a / b for a, b in times], n=4, method="inclusive")
        return without / with_it, quartiles


def main() -> None:
    """Runs the benchmark and prints its results."""
    options = parse()
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # ranks that wait must not spin
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_smar import runtime

    device = runtime.install()
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        save_tower(folder, options.hidden, options.layers)
        pairs = Pairs(options.ranks, folder)
        rank = dist.get_rank()
        drawn = draw(options.pairs * options.ranks, "tiles", seed=3)[1].reshape(options.pairs, options.ranks)
        even = np.full_like(drawn, EVEN)
        pairs.ratio(even[:2], rank)  # the first steps allocate
        (gain, quartiles), (cost, cost_quartiles) = pairs.ratio(drawn, rank), pairs.ratio(even, rank)
    if rank == 0:
        ideal = float(drawn.max(1).sum() / np.ceil(drawn.mean(1)).sum())
        print(f"{options.ranks} replicas, {options.pairs} pairs of steps, {drawn.mean():.1f} tiles a sample ({device})")
        print(
            f"  time without balancing / with it   {gain:.3f}   quartiles of the pairs {quartiles[0]:.3f} to", end=" "
        )
        print(f"{quartiles[2]:.3f}; the encoder alone: {ideal:.3f}")
        print(f"  where all have {EVEN} tiles            {cost:.3f}   quartiles of the pairs ", end="")
        print(f"{cost_quartiles[0]:.3f} to {cost_quartiles[2]:.3f}")
        rows = simulated()
        print("\nTiles of the replica with most / mean, simulated:\n\nreplicas  samples  as read  balanced")
        for replicas, samples, most, balanced in rows:
            print(f"{replicas:8}  {samples:7}  {most:7.2f}  {balanced:8.2f}")
        if options.json:
            lost = {"speedup": gain, "balanced_loss_percent": 100 * (1 / cost - 1), "ideal": ideal}
            ideals = {f"ideal_{replicas}": most for replicas, samples, most, _ in rows if samples == 1}
            print(json.dumps(lost | ideals | {"simulated": rows, "device": device}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
