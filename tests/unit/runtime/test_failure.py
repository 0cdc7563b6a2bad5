# SPDX-License-Identifier: Apache-2.0
"""Tests of the sentence with which a rank ends, on the terminal and in torchrun's report."""

import subprocess
import sys

import pytest

from tests.launch import run, run_each_rank

SENTENCE = "--lr is missing; give it."


@pytest.fixture
def program(tmp_path):
    """A program that ends with a sentence on every rank."""
    path = tmp_path / "train.py"
    path.write_text(f"from megatron_smar.runtime.failure import end\nend({SENTENCE!r})\n")
    return path


def test_torchruns_report_ends_with_the_sentence_and_only_one_rank_writes_it_to_the_terminal(program):
    done = run(program, ranks=2, check=False)
    assert done.returncode == 1
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines.count(f"train.py: error: {SENTENCE}") <= 1, "more than one rank of the node wrote the sentence"
    report = lines[lines.index("Root Cause (first observed failure):") :]
    assert f"traceback : train.py: error: {SENTENCE}" in report, done.stdout
    assert "To enable traceback see" not in done.stdout


def test_without_torchrun_every_rank_writes_the_sentence(program):
    for done in run_each_rank(program, ranks=2, check=False):
        assert (done.returncode, done.stdout) == (1, f"train.py: error: {SENTENCE}\n")


def test_the_sentence_is_on_the_terminal_if_torchruns_error_file_cannot_be_written(program, tmp_path):
    environment = {"PATH": "", "LOCAL_RANK": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "missing" / "error.json")}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"train.py: error: {SENTENCE}\n")


OTHERS = [pytest.param(call, marks=pytest.mark.matrix) for call in ("dist.recv(value, 1)", "dist.barrier()")]


@pytest.mark.parametrize("collective", ["dist.all_reduce(value)", *OTHERS])
def test_a_rank_that_loses_its_peer_reports_it_in_one_sentence_instead_of_gloos_traceback(tmp_path, collective):
    path = tmp_path / "train.py"
    path.write_text(f"""
import torch, torch.distributed as dist
from megatron_smar.runtime import failure
failure.explain_lost_connections()
dist.init_process_group("gloo")
value = torch.zeros(4)
dist.all_reduce(value)
if dist.get_rank() == 1:
    failure.end({SENTENCE!r})
{collective}
""")
    left, ended = run_each_rank(path, ranks=2, check=False)
    assert ended.stdout.startswith(f"train.py: error: {SENTENCE}\n")
    assert left.returncode == 1
    assert "Traceback" not in left.stdout and "another rank ended first" in left.stdout
    under_torchrun = run(path, ranks=2, check=False).stdout
    cause = under_torchrun.rpartition("Root Cause (first observed failure):")[2]
    assert f"traceback : train.py: error: {SENTENCE}" in cause, under_torchrun


def test_any_other_error_keeps_its_traceback(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("from megatron_smar.runtime import failure\nfailure.explain_lost_connections()\n[][0]\n")
    done = run(path, check=False)
    assert done.returncode == 1 and "Traceback" in done.stdout and "IndexError" in done.stdout
