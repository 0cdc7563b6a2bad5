# SPDX-License-Identifier: Apache-2.0
"""What a job does when its ranks have ended, from the logs of its attempts."""

from pathlib import Path

from megatron_smar.launch.ended import STARTED, TRACKER, decide
from megatron_smar.launch.first_error import endings, first_error


def attempt(folder: Path, started: str = "") -> Path:
    folder.mkdir(parents=True)
    if started:
        (folder / STARTED).write_text(started)
    return folder


def log(folder: Path, rank: int, text: str, status: int | None, second: int = 0) -> None:
    end = (
        ""
        if status is None
        else f"rank {rank} on node{rank} ended with status {status} at 2030-01-01T00:00:{second:02}\n"
    )
    (folder / f"rank_{rank}.log").write_text(f"step 1\n{text}{end}")


def test_the_earliest_failure_is_the_first_error_and_not_the_lowest_rank(tmp_path):
    log(tmp_path, 0, "Connection closed by peer\n", 1, second=9)
    log(tmp_path, 10, 'Traceback (most recent call last):\n  File "a.py"\nOSError: disk full\n', 1, second=3)
    log(tmp_path, 2, "", None)
    text = first_error(tmp_path)
    assert text.startswith("rank 10 on node10 ended with status 1 at ") and "OSError: disk full" in text
    assert "closed by peer" not in text and "1 logs have no end (rank_2)" in text


def test_a_killed_rank_is_named_and_complete_ranks_are_no_error(tmp_path):
    log(tmp_path, 0, "", 0)
    assert first_error(tmp_path) is None
    log(tmp_path, 1, "", 137)
    assert "rank 1 on node1 killed (SIGKILL" in first_error(tmp_path)
    assert [ending.rank for ending in endings(tmp_path)[0]] == [0, 1]


def test_a_job_runs_again_as_long_as_one_of_three_attempts_made_a_checkpoint(tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    tracker = save / TRACKER
    steps = [("", ""), ("", "5"), ("5", "5"), ("5", "5"), ("5", "7"), ("7", "7"), ("7", "7"), ("7", "7")]
    for number, (start, end) in enumerate(steps):
        tracker.write_text(end)
        folder = attempt(tmp_path / "1" / f"attempt_{number}", start)
        assert decide(folder, 1, save)[0] is (number < len(steps) - 1), number


def test_a_complete_job_and_one_without_checkpoints_do_not_run_again(tmp_path):
    folder = attempt(tmp_path / "1" / "attempt_0")
    assert decide(folder, 0, tmp_path) == (False, "the job is complete")
    assert decide(folder, 1, None) == (False, "the job failed with status 1; it is not requeued")
    again, why = decide(folder, 143, tmp_path)
    assert again and why.startswith("the job was stopped by SIGTERM, without a checkpoint in ")
