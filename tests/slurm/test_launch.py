# SPDX-License-Identifier: Apache-2.0
"""tools/launch.py on a real SLURM: jobs of two nodes with two ranks each, on the CPU."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.functional.conftest import World
from tests.launch import ROOT
from tests.slurm.cluster import Cluster

# Every rank fails, rank 2 first.
FAILING = """
import os, sys, time
rank = int(os.environ["RANK"])
time.sleep(0.5 if rank == 2 else 3)
raise RuntimeError(f"the disk of rank {rank} is full")
"""
NODES = ["--cpu", "--nodes", 2, "--processes-per-node", 2, "--cpus-per-process", 1]


def launch(cluster: Cluster, logs: Path, *flags: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "tools/launch.py", "slurm", "--logs", str(logs), *map(str, flags)],
        cwd=ROOT,
        env=cluster.environment | {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def submitted(done: subprocess.CompletedProcess[str]) -> int:
    return int(re.match(r"job (\d+): ", done.stdout)[1])


def losses(text: str) -> dict[int, str]:
    found = re.findall(r"iteration +(\d+)/ .*? lm loss: (\S+) ", text)
    return {int(step): loss for step, loss in found}


def step_lines(folder: Path) -> dict[int, str]:
    """Returns the losses in the logs of all attempts of a job."""
    found: dict[int, str] = {}
    for log in sorted(folder.glob("attempt_*/rank_3.log")):
        found |= losses(log.read_text())
    return found


def test_a_job_that_always_fails_ends_after_three_attempts_and_names_the_first_rank_that_failed(cluster, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    done = launch(cluster, tmp_path / "logs", *NODES, "--", program, "--save", tmp_path / "save")
    job = submitted(done)
    cluster.wait(job, "FAILED", seconds=120)
    log = (tmp_path / "logs" / f"{job}.log").read_text()
    assert log.count("it is requeued") == 2
    assert "its last 3 attempts made no checkpoint, so it is not requeued" in log
    assert len(re.findall(r"rank 2 on node2 ended with status 1 at \S+, the first of all ranks", log)) == 3
    assert "RuntimeError: the disk of rank 2 is full" in log
    attempts = json.loads((tmp_path / "logs" / str(job) / "attempts.json").read_text())
    assert [attempt["status"] for attempt in attempts] == [1, 1, 1]


def test_a_run_warned_before_its_time_limit_is_requeued_and_has_the_losses_of_torchrun(
    cluster: Cluster, world: World, tmp_path: Path
):
    training = ["--micro-batch-size", 2, "--global-batch-size", 8, "--num-workers", 0, "--train-iters", 12]
    expected = losses(world.train(*training, ranks=4).stdout)
    command = ["pretrain_vlm.py", *world.flags, *training, "--save", tmp_path / "save", "--load", tmp_path / "save"]
    command += ["--save-interval", 100]
    job = submitted(launch(cluster, tmp_path / "logs", *NODES, "--", *command))
    end = time.monotonic() + 240
    while len(step_lines(tmp_path / "logs" / str(job))) < 2:
        assert time.monotonic() < end, (tmp_path / "logs" / f"{job}.log").read_text()
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    cluster.wait(job, "COMPLETED", seconds=300)
    log = (tmp_path / "logs" / f"{job}.log").read_text()
    assert cluster.restarts(job) == 1 and log.count("was stopped by SIGTERM, at step ") == 1, log
    assert "the job is complete" in log
    assert step_lines(tmp_path / "logs" / str(job)) == expected != {}
