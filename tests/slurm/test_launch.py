# SPDX-License-Identifier: Apache-2.0
"""tools/launch.py on a real SLURM: jobs of two nodes with two ranks each, on the CPU."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.functional.conftest import World
from tests.slurm.jobs import NODES, Jobs

# Every rank fails, rank 2 first.
FAILING = """
import os, sys, time
rank = int(os.environ["RANK"])
time.sleep(0.5 if rank == 2 else 3)
raise RuntimeError(f"the disk of rank {rank} is full")
"""


def losses(text: str) -> dict[int, str]:
    found = re.findall(r"iteration +(\d+)/ .*? lm loss: (\S+) ", text)
    return {int(step): loss for step, loss in found}


def step_lines(folder: Path) -> dict[int, str]:
    """Returns the losses in the logs of all attempts of a job."""
    found: dict[int, str] = {}
    for log in sorted(folder.glob("attempt_*/rank_1.log")):
        found |= losses(log.read_text())
    return found


def test_a_job_that_always_fails_ends_after_three_attempts_and_names_the_first_rank_that_failed(jobs: Jobs):
    [job] = jobs.submit(*NODES, "--no-preflight", "--", jobs.program(FAILING), "--save", jobs.save)
    log = jobs.finish(job, "FAILED")
    assert log.count("it is requeued") == 2
    assert "its last 3 attempts made no checkpoint, so it is not requeued" in log
    assert len(re.findall(r"rank 2 on node2 ended with status 1 at \S+, the first of all ranks", log)) == 3
    assert "RuntimeError: the disk of rank 2 is full" in log
    attempts = json.loads((jobs.logs / str(job) / "attempts.json").read_text())
    assert [attempt["status"] for attempt in attempts] == [1, 1, 1]


@pytest.mark.matrix  # tests/chaos has the same in short
def test_a_run_warned_before_its_time_limit_is_requeued_and_has_the_losses_of_torchrun(jobs: Jobs, world: World):
    training = ["--micro-batch-size", 2, "--global-batch-size", 4, "--num-workers", 0, "--train-iters", 8]
    expected = losses(world.train(*training, ranks=2).stdout)
    command = ["pretrain_vlm.py", *world.flags, *training, "--save", jobs.save, "--load", jobs.save]
    command += ["--save-interval", 100]
    one_each = ["--cpu", "--nodes", 2, "--processes-per-node", 1, "--cpus-per-process", 1]
    [job] = jobs.submit(*one_each, "--", *command)
    end = time.monotonic() + 240
    while len(step_lines(jobs.logs / str(job))) < 2:
        assert time.monotonic() < end, jobs.log(job)
        time.sleep(0.05)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    log = jobs.finish(job, "COMPLETED", seconds=300)
    assert jobs.cluster.restarts(job) == 1 and log.count("was stopped by SIGTERM, at step ") == 1, log
    assert log.count("All-reduce of 2 processes: ") == 2 and "the job is complete" in log
    assert step_lines(jobs.logs / str(job)) == expected != {}
