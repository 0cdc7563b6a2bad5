# SPDX-License-Identifier: Apache-2.0
"""What a job does when an attempt starts, from the marker, the history and the logs before it."""

from pathlib import Path

from megatron_smar.launch.attempts import TRACKER, read_history
from megatron_smar.launch.ended import CHAIN, REQUEUE, decide
from megatron_smar.launch.started import COMPLETE, STOPPED, start


def folder(logs: Path, job: str, number: int = 0) -> Path:
    made = logs / job / f"attempt_{number}"
    made.mkdir(parents=True)
    return made


def test_a_complete_run_runs_again_in_a_later_job_of_the_same_file(tmp_path):
    logs = tmp_path / "logs"
    first = folder(logs, "1")
    assert start(first, tmp_path, tmp_path / "complete", "") == (0, "")
    decide(first, 0, tmp_path, CHAIN, tmp_path / "complete")
    for job, after in (("2", "afterany:1"), ("9", "")):
        status, text = start(folder(logs, job), tmp_path, tmp_path / "complete", after)
        assert status == COMPLETE and text.startswith("the run is complete (job 1, ")
        assert text.endswith(f"nothing to do. Remove {tmp_path / 'complete'} to run it again.")


def test_a_chain_without_progress_goes_on_or_one_with_progress_stops(tmp_path):
    logs = tmp_path / "logs"
    for job, after in (("1", ""), ("2", "afterany:1"), ("3", "afterany:2"), ("4", "afterany:3")):
        made = folder(logs, job)
        status, text = start(made, tmp_path, tmp_path / "complete", after)
        assert (status == STOPPED) is (job == "4")
        decide(made, 1, tmp_path, CHAIN)
    assert text.startswith("the last 3 attempts at this run made no checkpoint, so it does not start: read their first")
    assert "jobs 1, 2, 3, and submit again" in text
    assert start(folder(logs, "5"), tmp_path, tmp_path / "complete", "")[0] == 0  # by hand: a new count
    (tmp_path / TRACKER).write_text("10")
    assert start(folder(logs, "6"), tmp_path, tmp_path / "complete", "afterany:3")[0] == 0


def test_an_attempt_whose_node_was_lost_is_forgotten_or_not_named(tmp_path):
    logs = tmp_path / "logs"
    first = folder(logs, "1")
    start(first, tmp_path, tmp_path / "complete", "")
    (first / "rank_0.log").write_text("rank 0 on node1 started at T\nrank 0 on node1 ended with status 1 at T\n")
    (first / "rank_1.log").write_text("rank 1 on node2 started at T\nstep 1\n")
    status, text = start(folder(logs, "1", 1), tmp_path, tmp_path / "complete", "")
    assert status == 0
    assert text == f"the attempt before ({first}) has no end: SLURM ended it, or a node was lost (node2: rank_1)."
    start(folder(logs, "1", 2), tmp_path, tmp_path / "complete", "")
    assert [attempt.status for attempt in read_history(logs / "1")] == [None] * 3
    assert start(folder(logs, "1", 3), tmp_path, tmp_path / "complete", "")[0] == STOPPED


def test_the_history_of_a_requeued_job_is_that_of_the_job_before_it(tmp_path):
    logs = tmp_path / "logs"
    for number in range(2):
        made = folder(logs, "5", number)
        start(made, tmp_path, tmp_path / "complete", "afterany:4")
        decide(made, 1, tmp_path, REQUEUE)
    assert [(attempt.job, attempt.attempt) for attempt in read_history(logs / "5")] == [
        ("5", "attempt_0"),
        ("5", "attempt_1"),
    ]
