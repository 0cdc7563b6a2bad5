# SPDX-License-Identifier: Apache-2.0
"""tools/launch.py without SLURM: what it prints, writes and refuses."""

import sys
from pathlib import Path

import pytest

from megatron_smar.commands import launch


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    def program(*words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, words)])
        monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
        try:
            launch.main()
            status: object = 0
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return program


def test_a_dry_run_writes_files_or_prints_another_script_than_is_submitted(call, tmp_path):
    given = ["slurm", "--logs", tmp_path / "logs", "--env", "A=b c", "--", "pretrain_vlm.py", "--save=x"]
    status, printed = call(*given[:1], "--dry-run", *given[1:])
    assert status == 0 and not (tmp_path / "logs").exists()
    status, _ = call(*given)
    file = tmp_path / "logs" / "megatron_smar.sbatch"
    assert status == f"launch.py: error: there is no sbatch here; {file} is written, submit it on the cluster."
    assert file.read_text() == printed
    assert "export A='b c'" in printed and f"--save {Path.cwd() / 'x'}" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm", "--logs", "l"], "the command has no --save"),
        (["slurm", "--logs", "l", "--no-requeue"], "there is no command: give it after --"),
        (["slurm", "--logs", "l", "--env", "A", "--", "p", "--save", "x"], "--env A has no value; give NAME=VALUE."),
        (["slurm", "--logs", "l", "--activate", "/none", "--", "p", "--save", "x"], "--activate /none is no virtual"),
        (["local"], "there is no command: give it after --"),
        (["local", "--nodes", "2", "--", "p"], "the run needs 2 nodes"),
        (["local", "--lr", "1", "--", "p"], "--lr is no option of local; the command and its flags come after --."),
        (["slurm", "--logs", "l", "--tor", "--", "p"], "--tor is no option of slurm"),
    ],
)
def test_options_that_describe_no_job_are_refused_in_a_sentence(call, words, sentence):
    status, printed = call(*words)
    assert str(status).startswith(f"launch.py: error: {sentence}") and not printed


@pytest.mark.parametrize(("status", "wait"), [(0, True), (3, True), (0, False)])
def test_a_job_that_is_waited_for_is_named_before_it_ends_and_gives_its_status(call, tmp_path, status, wait):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/given\necho "17;cluster"\nexit {status}\n')
    sbatch.chmod(0o755)
    ended, printed = call("slurm", "--logs", tmp_path / "l", *["--wait"][: int(wait)], "--", "p", "--save", "x")
    assert ended == status and printed.startswith("job 17: ")
    assert ("ended with status 3" in printed) == (status == 3)
    assert ("--wait" in (tmp_path / "given").read_text()) == wait


def test_a_job_that_sbatch_refuses_is_reported_with_its_reason(call, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'no such partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    status, _ = call("slurm", "--logs", tmp_path / "l", "--wait", "--", "p", "--save", "x")
    assert str(status).endswith("megatron_smar.sbatch: no such partition")


def test_first_error_of_ranks_that_all_ended_well_invents_one(call, tmp_path):
    (tmp_path / "rank_0.log").write_text("rank 0 on node1 ended with status 0 at 2030-01-01T00:00:00.000\n")
    assert call("first-error", tmp_path) == (0, f"No rank in {tmp_path} ended with an error.\n")
