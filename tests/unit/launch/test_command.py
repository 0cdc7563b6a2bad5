# SPDX-License-Identifier: Apache-2.0
"""tools/launch.py without SLURM: what it prints, writes and refuses."""

import re
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
    assert "export A='b c'" in printed and f"save={Path.cwd() / 'x'}\n" in printed


def test_a_complete_run_is_submitted_again_or_another_one_in_its_folder_is_not(call, tmp_path):
    flags = ["slurm", "--logs", tmp_path, "--", "pretrain_vlm.py", "--save=x"]
    _, printed = call(*flags[:1], "--dry-run", *flags[1:])
    marker = Path(re.search("^complete=(.*)$", printed, re.MULTILINE)[1])
    marker.write_text("job 1")
    status, _ = call(*flags)
    assert (
        status == f"launch.py: error: this run is complete: {marker} says so; remove it to run the same command again."
    )
    status, _ = call(*flags, "--lr", 1)
    assert "there is no sbatch here" in status and marker.exists()


def test_flags_do_not_reach_the_job(call, tmp_path):
    (tmp_path / "sweep").write_text("--lr 1\n--lr 2\n")
    given = ["--logs", tmp_path, "--preflight-seconds", 30, "--spare-nodes", 2, "--nodes", 3, "--array-parallel", 1]
    given += ["--array", tmp_path / "sweep", "--", "p.py", "--save", tmp_path]
    status, printed = call("slurm", "--dry-run", *given)
    assert status == 0
    assert "#SBATCH --nodes=5\n" in printed and "#SBATCH --array=0-1%1\n" in printed
    assert "--nodes 3 --seconds 30 --among" in printed and "--nodes=3 --ntasks=24 --ntasks-per-node=8" in printed
    status, printed = call(
        "slurm", "--dry-run", "--no-preflight", "--chain", 2, "--logs", "l", "--", "p", "--save", "x"
    )
    assert status == 0 and "preflight" not in printed and "#SBATCH --no-requeue\n" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm", "--logs", "l", "--", "p"], "the command has no --save, so that a requeued job"),
        (
            ["slurm", "--logs", "l", "--chain", "2", "--no-requeue", "--", "p"],
            "the command has no --save, so that a ch",
        ),
        (["slurm", "--logs", "l", "--no-requeue"], "there is no command: give it after --"),
        (["slurm", "--logs", "l", "--env", "A", "--", "p", "--save", "x"], "--env A has no value; give NAME=VALUE."),
        (["slurm", "--logs", "l", "--activate", "/none", "--", "p", "--save", "x"], "--activate /none is no virtual"),
        (["local", "--", "p", "--data-path", "https://me:pw@host/a"], "--data-path has a user or password"),
        (["local", "--", "p", "--hf-token", "pw"], "the command has --hf-token, which every user"),
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
