# SPDX-License-Identifier: Apache-2.0
"""Attempts on a real SLURM: chains, arrays, torchrun and lost nodes."""

import re
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import NODES, Jobs

ONE = ["--cpu", "--nodes", 1, "--processes-per-node", 1, "--no-preflight"]
# Each attempt makes a checkpoint one step further, up to --until, and fails; the one that finds the last one is done.
STEPS = """
import sys
from pathlib import Path
save, last = Path(sys.argv[sys.argv.index("--save") + 1]), int(sys.argv[sys.argv.index("--until") + 1])
save.mkdir(parents=True, exist_ok=True)
tracker = save / "latest_checkpointed_iteration.txt"
step = int(tracker.read_text()) if tracker.exists() else 0
if step < last:
    tracker.write_text(str(step + 1))
sys.exit(0 if step >= int(sys.argv[-1]) else "fails")
"""
# A rank that waits makes a checkpoint one second after TERM and ends as pretrain_vlm.py does; the next attempt is done.
TERM = """
import os, signal, sys, time
from pathlib import Path
save = Path(sys.argv[sys.argv.index("--save") + 1])
save.mkdir(parents=True, exist_ok=True)
tracker = save / "latest_checkpointed_iteration.txt"
def end(*_):
    time.sleep(1)
    tracker.write_text("1")
    print("saved by", os.environ["RANK"], flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, end)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "local", os.environ["LOCAL_RANK"], flush=True)
print("meets at", os.environ["MASTER_PORT"], "with", *sys.argv[1:], flush=True)
while "--waits" in sys.argv and not tracker.exists():
    time.sleep(0.1)
"""
# The first attempt waits: for ever, or until a node that it depends on is lost. The second one is done.
WAITS = """
import os, time
while os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    time.sleep(0.1)
"""


def until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def text(folder: Path, pattern: str) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob(pattern)))


def test_a_chain_does_not_continue_or_runs_on_when_it_is_complete(jobs: Jobs):
    command = ["--", jobs.program(STEPS), "--save", jobs.save, "--until", 1, 1]
    numbers = jobs.submit(*ONE, "--chain", 3, *command)
    first, second, third = (
        jobs.finish(job, state) for job, state in zip(numbers, ("FAILED", "COMPLETED", "COMPLETED"), strict=True)
    )
    assert "failed with status 1, at step 1 in " in first and "the next job of its chain continues" in first
    assert "the job is complete" in second
    assert re.fullmatch(
        rf"megatron-smar-launch: the run is complete \(job {numbers[1]}, .*\): nothing to do.*\n", third
    )
    again = int(jobs.cluster.run("sbatch", "--parsable", jobs.logs / "megatron_smar.sbatch"))
    assert "the run is complete" in jobs.finish(again, "COMPLETED")
    refused = jobs.launch(*ONE, "--chain", 3, *command, check=False)
    assert refused.returncode and "this run is complete: " in refused.stderr


def test_a_chain_without_progress_runs_to_its_end(jobs: Jobs):
    numbers = jobs.submit(*ONE, "--chain", 5, "--", jobs.program(STEPS), "--save", jobs.save, "--until", 1, 2)
    logs = [jobs.finish(job, "FAILED") for job in numbers]
    assert ["continues" in log for log in logs] == [True, True, True, False, False]
    assert "its last 3 attempts made no checkpoint, so the chain ends" in logs[3]
    assert "the last 3 attempts at this run made no checkpoint, so it does not start" in logs[4]
    assert not list((jobs.logs / str(numbers[4]) / "attempt_0").iterdir())


def test_an_element_of_an_array_is_warned_or_requeued_with_another_one(jobs: Jobs):
    sweep = jobs.root / "sweep.txt"
    sweep.write_text("--lr 1e-4 --waits\n--lr 3e-4 --waits  # another learning rate\n--note 'a \"b\" $c'\n")
    flags = ["--array", sweep, "--array-parallel", 3, "--", jobs.program(TERM), "--save", jobs.save]
    [array] = jobs.submit(*ONE, *flags)
    names = ["lr_1e-4_waits", "lr_3e-4_waits"]
    until(lambda: all("meets at" in text(jobs.logs / name, "*/*/rank_0.log") for name in names))
    others = [jobs.finish(f"{array}_2", "COMPLETED")]
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    log = jobs.finish(f"{array}_1", "COMPLETED")
    assert "was stopped by SIGTERM, at step 1" in log and "the job is complete" in log
    assert jobs.cluster.state(f"{array}_0") == "RUNNING"
    (jobs.save / names[0] / "latest_checkpointed_iteration.txt").write_text("1")
    others.append(jobs.finish(f"{array}_0", "COMPLETED"))
    assert not any("SIGTERM" in each or "requeue" in each for each in others)
    folders = sorted(folder for folder in jobs.logs.iterdir() if folder.is_dir())
    said = [text(folder, "*/*/rank_0.log") for folder in folders]
    assert [f"--save {jobs.save / folder.name}\n" in each for folder, each in zip(folders, said, strict=True)] == [
        True
    ] * 3
    assert "--lr 3e-4 --waits" in said[1] and '--note a "b" $c' in said[2]
    assert len({re.search(r"meets at (\d+)", each)[1] for each in said}) == 3


@pytest.mark.matrix
def test_torchrun_numbers_ranks_wrongly_or_ends_them_before_they_have_saved(jobs: Jobs):
    [job] = jobs.submit(
        *NODES, "--torchrun", "--no-preflight", "--", jobs.program(TERM), "--save", jobs.save, "--waits"
    )
    logs = jobs.logs / str(job)
    until(lambda: len(re.findall(r"^rank \d of 4 local", text(logs, "attempt_0/*.log"), re.MULTILINE)) == 4)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    log = jobs.finish(job, "COMPLETED")
    first = text(logs, "attempt_0/*.log")
    ranks = re.findall(r"^rank (\d) of 4 local (\d)$", first, re.MULTILINE)
    assert sorted(ranks) == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert sorted(re.findall(r"saved by (\d)", first)) == ["0", "1", "2", "3"]
    assert jobs.cluster.restarts(job) == 1 and "was stopped by SIGTERM, at step 1 in " in log
    assert "the first of all ranks" not in log and "the job is complete" in log


@pytest.mark.parametrize("lost", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_a_job_whose_node_is_lost_hangs_or_does_not_say_which_one(jobs: Jobs, lost: int):
    [job] = jobs.submit(*NODES, "--no-preflight", "--", jobs.program(WAITS), "--save", jobs.save)
    logs = jobs.logs / str(job)
    until(lambda: text(logs, "attempt_0/*.log").count(" started at ") == 4)
    jobs.cluster.lose(lost)
    try:
        log = jobs.finish(job, "COMPLETED")
    finally:
        jobs.cluster.restore(lost)
    assert jobs.cluster.restarts(job) == 1
    assert f"the attempt before ({logs}/attempt_0) has no end: SLURM ended it, or a node was lost (" in log
    assert re.search(rf"[(; ]node{lost}: rank_{2 * lost - 2}, rank_{2 * lost - 1}[;)]", log), log
