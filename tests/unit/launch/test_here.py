# SPDX-License-Identifier: Apache-2.0
"""A run on this machine: torchrun's words, the log beside the terminal, signals, and the exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_smar.launch import here
from tests.launch import ROOT

NODE = {"NODE_RANK": "3", "MASTER_ADDR": "node1"}
# Says that it runs, waits for a signal, and ends as a run does that has saved: with 128 + the signal.
WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, _: (print("saved", flush=True), sys.exit(128 + number)))
print("running", flush=True)
time.sleep(30)
"""


def started(*words: str, log: Path) -> subprocess.Popen[str]:
    program = f"from megatron_smar.launch import here; raise SystemExit(here.run({words!r}, here.Path({str(log)!r})))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_one_node_needs_no_address_and_several_get_this_node_s_number():
    assert here.torchrun(1, 8, {})[1:] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone"]
    words = " ".join(here.torchrun(8, 4, NODE))
    assert "--nproc-per-node 4 --nnodes 8 --node-rank 3 --master-addr node1 --master-port 29500" in words
    assert "--master-port 1234" in " ".join(here.torchrun(8, 4, NODE | {"MASTER_PORT": "1234"}))


@pytest.mark.parametrize(
    ("nodes", "processes", "environment", "sentence"),
    [
        (8, 8, {}, "the run needs 8 nodes: submit it to SLURM, or start it on each node with NODE_RANK"),
        (8, 8, {"NODE_RANK": "0"}, "the run needs 8 nodes"),
        (8, 8, NODE | {"NODE_RANK": "8"}, "NODE_RANK is 8; give a number from 0 to 7."),
        (8, 8, NODE | {"NODE_RANK": "-1"}, "NODE_RANK is -1; give a number from 0 to 7."),
        (0, 8, {}, "--nodes is 0; give 1 or more."),
        (1, 0, {}, "--processes-per-node is 0; give 1 or more."),
    ],
)
def test_a_place_that_no_torchrun_can_have_is_refused_in_a_sentence(nodes, processes, environment, sentence):
    with pytest.raises(ValueError) as error:
        here.torchrun(nodes, processes, environment)
    assert str(error.value).startswith(sentence)


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(26)))
    assert [here.threads_of_each(number) for number in (1, 8, 64)] == [26, 3, 1]


def test_the_log_has_what_the_terminal_has_and_is_added_to(tmp_path):
    log = tmp_path / "logs" / "stage1.log"
    shown = ""
    for status in (0, 7):
        code = f"import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr); sys.exit({status})"
        process = started(sys.executable, "-c", code, log=log)
        shown += process.communicate(timeout=60)[0]
        assert process.returncode == status
    assert log.read_text() == shown and shown.count("out\nerr\n") == 2


def test_a_signal_reaches_the_command_which_saves_and_gives_its_status(tmp_path):
    process = started(sys.executable, "-c", WAITS, log=tmp_path / "log")
    while process.stdout.readline() != "running\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_killed_command_gives_128_and_the_signal(tmp_path):
    process = started("bash", "-c", "kill -KILL $$", log=tmp_path / "log")
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
