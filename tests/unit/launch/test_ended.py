# SPDX-License-Identifier: Apache-2.0
"""What a job does when its ranks have ended, from the logs of its attempts."""

from pathlib import Path

from megatron_smar.launch.attempts import TRACKER, begin
from megatron_smar.launch.ended import CHAIN, REQUEUE, decide
from megatron_smar.launch.first_error import endings, first_error


def log(folder: Path, rank: int, text: str, status: int | None, second: int = 0) -> None:
    end = (
        ""
        if status is None
        else f"rank {rank} on node{rank} ended with status {status} at 2030-01-01T00:00:{second:02}\n"
    )
    begin = f"rank {rank} on node{rank} started at 2030-01-01T00:00:00\n"
    (folder / f"rank_{rank}.log").write_text(f"{begin}step 1\n{text}{end}")


def test_the_earliest_failure_is_the_first_error_and_not_the_lowest_rank(tmp_path):
    log(tmp_path, 0, "Connection closed by peer\n", 1, second=9)
    log(tmp_path, 10, 'Traceback (most recent call last):\n  File "a.py"\nOSError: disk full\n', 1, second=3)
    log(tmp_path, 2, "", None)
    text = first_error(tmp_path)
    assert text.startswith("rank 10 on node10 ended with status 1 at ") and "OSError: disk full" in text
    assert "closed by peer" not in text and "1 logs have no end (node2: rank_2)" in text


def test_a_torchrun_that_was_warned_is_taken_for_one_that_failed(tmp_path):
    log(tmp_path, 0, "Traceback\ntorch...api.SignalException: Process 535 got signal: 15\n", 1)
    assert endings(tmp_path)[0][0].status == 143


def test_a_killed_rank_is_named_and_complete_ranks_are_no_error(tmp_path):
    log(tmp_path, 0, "", 0)
    assert first_error(tmp_path) is None
    log(tmp_path, 1, "", 137)
    assert "rank 1 on node1 killed (SIGKILL" in first_error(tmp_path)
    assert [ending.rank for ending in endings(tmp_path)[0]] == [0, 1]


def run(
    logs: Path, save: Path, start: str, end: str, number: int, job: str = "1", then: str = REQUEUE, after: str = ""
):
    """Goes through an attempt that begins and ends with a checkpoint at these steps."""
    (save / TRACKER).write_text(start)
    folder = logs / job / f"attempt_{number}"
    folder.mkdir(parents=True)
    begin(folder, save, after)
    (save / TRACKER).write_text(end)
    return decide(folder, 1, save, then)


def test_a_job_runs_again_as_long_as_one_of_three_attempts_made_a_checkpoint(tmp_path):
    steps = [("", ""), ("", "5"), ("5", "5"), ("5", "5"), ("5", "7"), ("7", "7"), ("7", "7"), ("7", "7")]
    for number, (start, end) in enumerate(steps):
        assert run(tmp_path / "logs", tmp_path, start, end, number)[0] is (number < len(steps) - 1), number


def test_attempts_of_a_chain_are_counted_over_its_jobs_and_not_over_others(tmp_path):
    logs, said = tmp_path / "logs", []
    for job, after in (("7", ""), ("8", "afterany:7"), ("9", "afterany:8")):
        again, why = run(logs, tmp_path, "5", "5", 0, job, CHAIN, after)
        assert not again
        said.append(why.rpartition(", ")[2] if job != "9" else why)
    assert said[:2] == ["if there is one"] * 2
    assert said[2].endswith("its last 3 attempts made no checkpoint, so the chain ends")
    assert "its last 3 attempts" not in run(logs, tmp_path, "5", "5", 0, "10", CHAIN, "")[1]


def test_a_complete_job_and_one_without_checkpoints_do_not_run_again(tmp_path):
    folder = tmp_path / "1" / "attempt_0"
    folder.mkdir(parents=True)
    assert decide(folder, 1, None) == (False, "the job failed with status 1; it is not requeued")
    again, why = decide(folder, 143, tmp_path, REQUEUE)
    assert again and why.startswith("the job was stopped by SIGTERM, without a checkpoint in ")
    marker = tmp_path / "complete"
    assert not decide(folder, 1, tmp_path, marker=marker)[0] and not marker.exists()
    assert decide(folder, 0, tmp_path, REQUEUE, marker) == (False, "the job is complete")
    assert "job 1, " in marker.read_text()
