# SPDX-License-Identifier: Apache-2.0
"""Saves of a run as a user starts it: asynchronous, on a full disk, and interrupted by signals."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_smar.checkpoint.torch_dist import CheckpointReader
from megatron_smar.reliability.saving import STAGING
from tests.chaos.campaign import compare_checkpoints, disk
from tests.functional.conftest import World
from tests.functional.test_signals import Started
from tests.launch import run

SIZES = ["--micro-batch-size", 2, "--global-batch-size", 8, "--num-workers", 0, "--save-interval", 2]
TRACKER = "latest_checkpointed_iteration.txt"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.mark.matrix  # tests/chaos has the same in short
def test_training_changes_what_an_asynchronous_save_is_still_writing(world: World, tmp_path: Path):
    """Each write takes so long that steps are made meanwhile; the checkpoints must be those of a synchronous run."""
    flags = [*world.flags, *SIZES, "--train-iters", 8, "--use-distributed-optimizer"]
    said = run(
        "tests/functional/slow_disk.py", 0.001, *flags, "--save", tmp_path / "slow", "--async-save", ranks=2
    ).stdout
    run("pretrain_vlm.py", *flags, "--save", tmp_path / "plain", ranks=2)
    staged, next_step = said.index("step 4 is staged"), said.index("iteration        5/")
    assert staged < next_step < said.index("step 4 is saved"), "no step was made during the save"
    for step in (2, 4, 6, 8):
        compare_checkpoints(CheckpointReader(tmp_path / "plain", step), CheckpointReader(tmp_path / "slow", step))


@needs_root
def test_a_full_disk_leaves_half_a_checkpoint_or_ends_the_run_without_saying_so(world: World, tmp_path: Path):
    with disk(tmp_path / "disk", 2500) as place:  # a checkpoint has 1,500 KB
        save = place / "save"
        done = world.train(*SIZES, "--train-iters", 10, "--save", save, "--max-failed-saves", 2, ranks=2, check=False)
        assert done.returncode != 0
        assert "step 4 was not saved" in done.stdout and "No space left on device (rank" in done.stdout
        assert "the run continues and tries again at the next save (1 of --max-failed-saves 2)" in done.stdout
        assert "iteration        6/" in done.stdout and "iteration        7/" not in done.stdout
        assert "The newest checkpoint is that of step 2." in done.stdout
        assert "Traceback" not in done.stdout.partition("pretrain_vlm.py: error: step 6 was not saved")[0]
        assert sorted(path.name for path in save.glob("*") if path.is_dir()) == ["dataloader", "iter_0000002"]
        assert not (save / STAGING).exists() and (save / TRACKER).read_text() == "2"


@needs_root
def test_a_run_trains_for_nothing_because_its_disk_has_no_room_for_a_checkpoint(world: World, tmp_path: Path):
    with disk(tmp_path / "disk", 500) as place:
        errors = world.errors(*SIZES, "--train-iters", 4, "--save", place / "save")
    said = r"--save \S+ has 0\.000\d+ GB free, and a checkpoint of this run has about 0\.001\d* GB: make room, or"
    assert len(errors) == 2 and all(re.search(said, error) for error in errors), errors


@pytest.mark.matrix
def test_a_second_signal_spoils_the_save_that_the_first_has_asked_for(world: World, tmp_path: Path):
    save = tmp_path / "save"
    started = Started(
        tmp_path, "tests/functional/slow_disk.py", 0.001, *world.flags, *SIZES, "--train-iters", 1000, "--save", save
    )
    started.wait_for_step(3)
    started.signal_all(signal.SIGTERM)
    end = time.monotonic() + 60
    before = (save / TRACKER).read_text() if (save / TRACKER).exists() else ""
    while "the run ends after this step" not in started.output or not any((save / STAGING).glob("iter_*/*.distcp")):
        assert time.monotonic() < end and started.process.poll() is None, started.output
        time.sleep(0.01)
    for sig in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        started.signal_all(sig)
        time.sleep(0.2)
    assert started.end(120) == 128 + signal.SIGTERM, started.output
    assert "the checkpoint is being saved; only SIGKILL ends that" in started.output
    assert (save / TRACKER).read_text() != before and f"stopped after step {(save / TRACKER).read_text()} " in (
        started.output
    )
