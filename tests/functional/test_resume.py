# SPDX-License-Identifier: Apache-2.0
"""A run that was killed resumes with the same samples and bit-identical losses."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_smar.data import load_loader_state
from megatron_smar.data.sample_log import read_recorded
from megatron_smar.report.scalars import read_scalars
from tests.conftest import free_port
from tests.launch import ROOT, users_environment

SMAR = ["--modality-routing", "smar", "--smar-d-min", "3", "--smar-d-max", "4", "--smar-coeff", "0.1"]
SIZES = [*SMAR, "--micro-batch-size", 2, "--global-batch-size", 8, "--num-workers", 1]


def kill_in_step(step, samples, *command, ranks):
    """Starts a program on several ranks and kills them all with SIGKILL, in a step or soon after it."""
    environment = users_environment() | {
        "OMP_NUM_THREADS": "1",
        "MEGATRON_SMAR_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
    }
    options = {"cwd": ROOT, "start_new_session": True, "stdout": subprocess.DEVNULL}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(ranks)
    ]
    end = time.monotonic() + 120
    try:
        while step not in read_recorded(samples):
            assert time.monotonic() < end and all(process.poll() is None for process in processes), "it never got there"
            time.sleep(0.02)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # its data workers too
            process.wait()


@pytest.mark.matrix  # tests/chaos has the same in short
def test_a_killed_run_is_resumed_by_the_same_command_with_the_same_samples_and_losses(world, tmp_path):
    """The run is a second stage: its command names the first stage's checkpoint, and must not start there again."""
    layout = ["--expert-model-parallel-size", 2]
    first = ["--train-iters", 1, "--save", tmp_path / "first", "--freeze", "vision", "language", "--no-save-optim"]
    first += ["--save-interval", 1]
    world.train(*SIZES, *layout, *first, ranks=2)
    common = [*SIZES, *layout, "--train-iters", 8, "--save-interval", 3, "--finetune", "--no-load-optim"]

    def flags(name):
        folders = {
            "--save": name,
            "--load": "first",
            "--tensorboard-dir": f"{name}-log",
            "--record-samples": f"{name}-keys",
        }
        return [*common, *(part for flag, folder in folders.items() for part in (flag, tmp_path / folder))]

    world.train(*flags("uninterrupted"), ranks=2)
    kill_in_step(5, tmp_path / "killed-keys", "pretrain_vlm.py", *world.flags, *flags("killed"), ranks=2)
    assert (tmp_path / "killed" / "latest_checkpointed_iteration.txt").read_text() == "3"
    before = read_recorded(tmp_path / "killed-keys")
    output = world.train(*flags("killed"), ranks=2).stdout
    assert "iteration        4/       8" in output and "iteration        3/       8" not in output
    assert f"--save {tmp_path / 'killed'} holds this run up to step 3: it resumes there" in output

    uninterrupted, killed = (read_recorded(tmp_path / f"{name}-keys") for name in ("uninterrupted", "killed"))
    assert list(uninterrupted) == list(range(1, 9)) and [len(uninterrupted[1][rank]) for rank in (0, 1)] == [2, 2]
    assert before[4] == uninterrupted[4], "the killed run had not begun the step that the resumed run repeats"
    assert killed == uninterrupted, "the samples differ after resuming"
    for name in ("lm loss", "smar loss", "grad-norm"):
        series = [read_scalars(tmp_path / f"{run}-log")[name] for run in ("uninterrupted", "killed")]
        (expected, resumed) = (dict(zip(s.steps, s.values, strict=True)) for s in series)
        assert {step: resumed[step] for step in range(4, 9)} == {step: expected[step] for step in range(4, 9)}, name


def plain(state):
    """Returns a state with lists instead of tensors, so that it can be compared."""
    if isinstance(state, dict):
        return {name: plain(item) for name, item in state.items()}
    if isinstance(state, list | tuple):
        return [plain(item) for item in state]
    return state.tolist() if hasattr(state, "tolist") else state


@pytest.mark.matrix
def test_virtual_pipeline_stages_restore_and_save_the_loaders_state(world, tmp_path):
    """Two stages of two chunks each resume from one rank's checkpoint, and save the same state as that rank."""
    common = [*SMAR, "--micro-batch-size", 2, "--global-batch-size", 8, "--num-workers", 0, "--num-layers", 4]
    common += ["--save-interval", 2, "--train-iters", 4]
    virtual = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
    one, two = (["--save", tmp_path / run, "--record-samples", tmp_path / f"{run}-keys"] for run in ("one", "two"))
    world.train(*common, *one, ranks=1)
    world.train(*common, *virtual, *two, "--load", tmp_path / "one", "--ckpt-step", 2, ranks=2)
    uninterrupted, piped = (read_recorded(tmp_path / f"{run}-keys") for run in ("one", "two"))
    assert list(uninterrupted) == [1, 2, 3, 4]
    assert piped == {step: uninterrupted[step] for step in (3, 4)}
    files = [next((tmp_path / run / "dataloader").glob("iter_0000004/*/*.pt")) for run in ("one", "two")]
    assert files[0].parent.name != files[1].parent.name, "Megatron names the folders of pipelines differently"
    assert plain(load_loader_state(files[0])) == plain(load_loader_state(files[1]))
