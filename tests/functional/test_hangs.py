# SPDX-License-Identifier: Apache-2.0
"""A run in which a rank gets stuck ends within its limit, with all stacks and a sentence that names the rank."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_smar.reliability.hangs import STATUS
from tests.conftest import free_port
from tests.launch import ROOT, users_environment

LIMIT = 5
DRIVER = "tests/functional/hanging_run.py"
LONG = "--micro-batch-size 2 --global-batch-size 4 --train-iters 100000".split()
SHORT = "--micro-batch-size 2 --global-batch-size 4 --train-iters 12 --num-workers 0".split()
LIMITS = ["--hang-seconds", LIMIT, "--hang-seconds-first-step", 120]


class Ranks:
    """Two ranks of a run, started as srun starts them, each with a log of its own."""

    def __init__(self, folder: Path, program: str, *flags: object, hang: str = "", of_rank: dict | None = None) -> None:
        common = {"OMP_NUM_THREADS": "1", "MEGATRON_SMAR_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "HANG": hang}
        common |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        self.logs, self.processes = [], []
        for rank in range(2):
            command = [sys.executable, "-u", program, *map(str, flags), *map(str, (of_rank or {}).get(rank, []))]
            self.logs.append(folder / f"rank_{rank}.log")
            environment = users_environment() | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with self.logs[-1].open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                )

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 1, seconds: float = 150) -> float:
        """Waits for text in a rank's log; returns when it was there."""
        end = time.monotonic() + seconds
        while text not in self.log(rank):
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.log(rank)[-3000:]
            time.sleep(0.05)
        return time.monotonic()

    def children(self, rank: int) -> list[int]:
        tasks = Path(f"/proc/{self.processes[rank].pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]

    def end(self, rank: int, seconds: float = 30) -> int:
        return self.processes[rank].wait(seconds)


@pytest.fixture
def start(world, tmp_path):
    """Starts two ranks, and leaves no process behind."""
    started = []

    def run(program: str, *flags: object, **options) -> Ranks:
        started.append(Ranks(tmp_path, program, *world.flags, *flags, **options))
        return started[-1]

    yield run
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.wait()


def sentence(log: str) -> str:
    (said,) = re.findall(r"error: (no progress for .*)", log)
    return said


def has_stacks(log: str, rank: int, function: str) -> bool:
    """Whether the log has the stacks of a rank's threads, with a function that its main thread is in."""
    return f"rank {rank}, in " in log and "MainThread" in log and f"in {function}\n" in log


def test_a_rank_that_stands_still_in_a_step_is_named_and_the_others_end_within_the_limit(start):
    run = start("pretrain_vlm.py", *LONG, "--num-workers", 0, *LIMITS)
    run.wait_for("iteration        3/")
    begin = time.monotonic()
    run.processes[1].send_signal(signal.SIGSTOP)
    assert run.end(0) == STATUS, run.log(0)[-3000:]
    assert LIMIT - 1 < time.monotonic() - begin < LIMIT + 10
    said = sentence(run.log(0))
    stopped = rf"rank 1 \(process {run.processes[1].pid} on \S+ is stopped by a signal\), the likely cause; rank 0 is "
    assert re.search(stopped + "waiting for other ranks in ", said), said
    assert f"--hang-seconds {LIMIT}" in said and re.search(r"in step \d+: ", said)
    assert has_stacks(run.log(0), 0, "train")  # in a step, or in the log line between two of them
    run.processes[1].send_signal(signal.SIGCONT)
    assert run.end(1) != 0


@pytest.mark.matrix
def test_a_reader_that_blocks_is_named_with_the_stack_of_its_data_worker_which_is_ended(start, world, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(world.root / "shards" / "train", shards)
    for shard in shards.rglob("*.tar"):
        shard.unlink()
        os.mkfifo(shard)
    of_rank = {1: ["--data-path", shards]}
    limits = ["--hang-seconds", LIMIT, "--hang-seconds-first-step", 15]
    run = start("pretrain_vlm.py", *LONG, "--num-workers", 1, *limits, of_rank=of_rank)
    assert run.end(1, 150) == STATUS and run.end(0) == STATUS, run.log(1)[-3000:]
    assert sentence(run.log(0)) == sentence(run.log(1))
    said = sentence(run.log(1))
    assert "before the first step: " not in said and "in step 1: rank 1 is in the data loader, the likely cause" in said
    assert has_stacks(run.log(1), 1, "train_step") and has_stacks(run.log(0), 0, "train_step")
    (worker,) = re.findall(r"rank 1, the stacks of data worker (\d+):", run.log(1))
    assert not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()
    assert "in _open_itarfile\n" in run.log(1), "not the place where the worker reads"


@pytest.mark.matrix
def test_a_save_that_blocks_on_one_rank_ends_both_and_names_it(start, tmp_path):
    (tmp_path / "save").mkdir()
    run = start(DRIVER, *SHORT, *LIMITS, "--save", tmp_path / "save", "--save-interval", 2, hang="save,0")
    run.wait_for("iteration        2/")
    begin = time.monotonic()
    assert run.end(0) == STATUS and run.end(1) == STATUS, run.log(0)[-3000:]
    assert LIMIT - 1 < time.monotonic() - begin < LIMIT + 10
    said = sentence(run.log(1))
    assert "in step 2: rank 0 is in a save, the likely cause; rank 1 is waiting for other ranks" in said
    assert has_stacks(run.log(0), 0, "stuck_save") and has_stacks(run.log(1), 1, "save_checkpoint_and_time")


@pytest.mark.matrix
def test_a_rank_whose_python_is_locked_still_writes_its_stacks_and_ends(start):
    run = start(DRIVER, *SHORT, *LIMITS, hang="lock,1")
    assert run.end(0, 150) == STATUS and run.end(1) == 1, run.log(0)[-3000:]
    assert "Timeout (" in run.log(1) and "in stuck_step\n" in run.log(1)
    assert "does not answer: none of its Python code runs), the likely cause" in sentence(run.log(0))


@pytest.mark.matrix
def test_a_save_that_takes_longer_than_the_limit_but_writes_is_no_hang(start, tmp_path):
    (tmp_path / "save").mkdir()
    run = start(DRIVER, *SHORT, *LIMITS, "--save", tmp_path / "save", "--save-interval", 12, hang="long save,1")
    assert run.end(0, 150) == 0 and run.end(1, 150) == 0, run.log(0)[-3000:]
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "12"


@pytest.mark.matrix
def test_a_rank_that_is_slower_than_the_other_is_named_with_the_part_of_the_step(start):
    run = start(DRIVER, *SHORT, "--train-iters", 40, "--log-interval", 20, *LIMITS, hang="slow,1")
    assert run.end(0, 150) == 0 and run.end(1, 150) == 0, run.log(0)[-3000:]
    said = re.findall(r"WARNING: iteration (\d+): (rank .* is slow in .*)", run.log(1))
    assert [step for step, _ in said] == ["20", "40"], run.log(1)
    assert all(line.startswith("rank 1 is slow in the forward and backward pass: ") for _, line in said), said
