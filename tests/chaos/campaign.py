# SPDX-License-Identifier: Apache-2.0
"""A campaign of faults against a job of four ranks on two nodes, whose results must be those of an undisturbed run."""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_smar.checkpoint.torch_dist import CheckpointReader
from megatron_smar.data.sample_log import read_recorded
from megatron_smar.report.scalars import event_files, read_scalars
from tests.chaos.faults import FAULTS, IN_SAVES, Target
from tests.functional.conftest import World
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import NODES, Jobs

SAVE_INTERVAL = 2
# Steps between two faults: each attempt has at least one complete checkpoint, or the job would end after three.
BETWEEN = (2 * SAVE_INTERVAL, 2 * SAVE_INTERVAL + 2)
COMMON = ["--micro-batch-size", 1, "--global-batch-size", 8, "--num-workers", 1, "--packing-buffer-size", 8]
COMMON += ["--save-interval", SAVE_INTERVAL, "--keep-last", 3, "--tensorboard-queue-size", 1, "--max-failed-saves", 4]
MEASURED = ("time", "mem", "wait", "throughput", "vs samples")  # words in the names of scalars that differ by nature
RUNS: dict[str, list[Any]] = {
    "SMAR, packing, expert parallelism, synchronous saves": [
        *["--modality-routing", "smar", "--smar-d-min", 3, "--smar-d-max", 4, "--smar-coeff", 0.1],
        *["--expert-model-parallel-size", 2],
    ],
    "SMoES, packing, distributed optimizer, asynchronous saves": [
        *["--modality-routing", "smoes", "--smoes-bins", 2, "--use-distributed-optimizer", "--async-save"],
    ],
}


@dataclass(frozen=True)
class Outcome:
    """What a fault has cost.

    Attributes:
        fault: What happened.
        step: The last step before it.
        in_save: Whether weights were being written.
        resumed: The first step after it.
        seconds: From the fault to the first step after it.
    """

    fault: str
    step: int
    in_save: bool
    resumed: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that were made again."""
        return max(0, self.step - self.resumed + 1)


def plan(kinds: Sequence[Callable[..., None]], chance: random.Random) -> list[tuple[int, Callable[..., None], float]]:
    """Returns for each fault the step after which it comes, and seconds to wait then; the order is drawn."""
    kinds = list(kinds)
    chance.shuffle(kinds)
    step, planned = 0, []
    for kind in kinds:
        step += chance.randint(*BETWEEN)
        planned.append((step, kind, chance.random()))
    return planned


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mounts a small disk of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def flags_of(world: World, name: str, steps: int, folder: Path, save: Path) -> list[object]:
    """Returns the flags of a run with its folders."""
    own = ["--train-iters", steps, "--save", save, "--load", save, "--tensorboard-dir", folder / "tensorboard"]
    return [*world.flags, *COMMON, *RUNS[name], *own, "--record-samples", folder / "samples"]


def run_campaign(
    world: World,
    name: str,
    kinds: Sequence[Callable[..., None]],
    seed: int,
    root: Path,
    report: Callable[[Outcome], None] = lambda outcome: None,
    ranks: int = 4,
) -> list[Outcome]:
    """Runs a job under faults and compares it with an undisturbed run.

    Args:
        world: The data and the model's flags.
        name: The run, one of `RUNS`.
        kinds: The faults.
        seed: Draws their order, times and places.
        root: An empty folder.
        report: Called after each fault.
        ranks: Number of ranks, half of them on each node.

    Raises:
        AssertionError: The job did not survive, or its results differ.
    """
    chance = random.Random(seed)
    planned = plan(kinds, chance)
    steps = planned[-1][0] + BETWEEN[1]
    reference, disturbed = root / "reference", root / "disturbed"
    world.train(
        *flags_of(world, name, steps, reference, reference / "save")[len(world.flags) :], ranks=ranks, timeout=1200
    )
    disturbed.mkdir()
    outcomes = []
    with disk(disturbed / "disk", 64 << 10) as place, Cluster(nodes=2) as cluster:
        jobs = Jobs(cluster, disturbed)
        command = ["pretrain_vlm.py", *flags_of(world, name, steps, disturbed, place / "save")]
        [job] = jobs.submit(*NODES, "--processes-per-node", ranks // 2, "--no-preflight", "--", *command)
        target = Target(cluster, job, jobs.logs / str(job), place / "save", ranks)
        for step, kind, delay in planned:
            outcomes.append(_cause(target, step, kind, delay, chance))
            report(outcomes[-1])
        cluster.wait(job, "COMPLETED", seconds=600)
        compare(reference, reference / "save", disturbed, place / "save", steps)
    return outcomes


def _cause(target: Target, step: int, kind: Callable[..., None], delay: float, chance: random.Random) -> Outcome:
    """Causes one fault after a step, and waits until the job has made a step after it."""
    target.wait(lambda: target.step() >= step, 300, f"step {step} is not reached")
    time.sleep(delay)
    attempt, starts_again = target.attempt(), FAULTS[kind]
    kind(target, chance)
    begin = time.monotonic()
    in_save = target.is_saving() or kind in IN_SAVES
    before = target.step(attempt)
    if starts_again:
        target.wait(lambda: target.attempt() > attempt and target.first_step(target.attempt()) > 0, 300, "no new start")
        resumed = target.first_step(target.attempt())
    else:
        target.wait(lambda: target.step(attempt) > before, 120, "the run does not continue")
        resumed = before + 1
    return Outcome((kind.__doc__ or "").rstrip("."), before, in_save, resumed, time.monotonic() - begin)


def compare(reference: Path, reference_save: Path, disturbed: Path, save: Path, steps: int) -> None:
    """Compares two runs: scalars of every attempt, samples, final weights and optimizer state, bit for bit."""
    expected = read_scalars(reference / "tensorboard")
    tags = [
        tag for tag in expected if not any(word in tag for word in ("time", "mem", "wait", "throughput", "vs samples"))
    ]
    assert {"lm loss", "grad-norm"} <= set(tags), tags
    seen: set[int] = set()
    for file in event_files(disturbed / "tensorboard"):
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / file.name).symlink_to(file)
            found = read_scalars(alone)
        for tag in tags:
            right = dict(zip(*expected[tag], strict=True))
            for step, value in zip(*found.get(tag, ((), ())), strict=True):
                assert value == right[step], f"{tag} of step {step} is {value!r}, not {right[step]!r}: {file.name}"
        seen |= set(found["lm loss"].steps if "lm loss" in found else ())
    assert seen == set(range(1, steps + 1)), sorted(set(range(1, steps + 1)) - seen)
    assert read_recorded(disturbed / "samples") == read_recorded(reference / "samples"), "other samples"
    compare_checkpoints(CheckpointReader(reference_save, steps), CheckpointReader(save, steps))


def compare_checkpoints(first: CheckpointReader, second: CheckpointReader) -> None:
    """Compares all tensors and objects of two checkpoints, but for the arguments, which name the folders."""
    assert first.tensors.keys() == second.tensors.keys() and any("exp_avg_sq" in key for key in first.tensors)
    for key, description in first.tensors.items():
        whole = (key, (0,) * len(description.size), tuple(description.size))
        left, right = first.read(*whole), second.read(*whole)
        assert left.dtype == right.dtype and torch.equal(_bits(left), _bits(right)), key
    assert first.objects == second.objects
    for key in first.objects:
        if not key.startswith("common_state"):
            assert first.read_object(key).getvalue() == second.read_object(key).getvalue(), key


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
