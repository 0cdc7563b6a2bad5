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
    assert "export A='b c'" in printed and f"save={Path.cwd() / 'x'}\n" in printed


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
    ],
)
def test_options_that_describe_no_job_are_refused_in_a_sentence(call, words, sentence):
    status, printed = call(*words)
    assert str(status).startswith(f"launch.py: error: {sentence}") and not printed


def test_first_error_of_ranks_that_all_ended_well_invents_one(call, tmp_path):
    (tmp_path / "rank_0.log").write_text("rank 0 on node1 ended with status 0 at 2030-01-01T00:00:00.000\n")
    assert call("first-error", tmp_path) == (0, f"No rank in {tmp_path} ended with an error.\n")
