# SPDX-License-Identifier: Apache-2.0
"""When a rank that makes no progress ends, what it says, and that it lets others work."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import HashStore

from megatron_smar.reliability import hangs
from megatron_smar.reliability.hang_report import Process, Report, numbers, own_report, process_status, sentence
from megatron_smar.reliability.hangs import STATUS, HangWatch
from megatron_smar.reliability.peers import Peers
from megatron_smar.runtime.progress import DATA, PASS, PROGRESS, SAVE, START, Place, section
from tests.launch import ROOT

WATCHED = """
import sys, threading, time
from megatron_smar.reliability.hangs import HangWatch
from megatron_smar.runtime.progress import DATA, PROGRESS, SAVE, section
PROGRESS.steps = PROGRESS.step = 1
watch = HangWatch(1.0, 0.0, 0, 1)
watch.start()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that is watched, with a limit of one second."""
    command = [sys.executable, "-c", WATCHED + code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_process_without_progress_ends_with_its_stacks_and_its_children_are_ended():
    code = """
import multiprocessing
def wait_for_ever():
    time.sleep(1000)
child = multiprocessing.get_context("fork").Process(target=wait_for_ever)
child.start()
print(child.pid, flush=True)
with section(DATA):
    wait_for_ever()
"""
    done = run(code)
    assert done.returncode == STATUS
    assert "Thread MainThread (most recent call first):" in done.stderr and "in wait_for_ever" in done.stderr
    assert "no progress for 1 s (--hang-seconds 1), in step 1: rank 0 is in the data loader. The stacks" in done.stderr
    deadline = time.monotonic() + 20  # a killed process ends when it is next scheduled
    while process_status(done.stdout.strip(), "State")[:1] not in ("", "Z"):
        assert time.monotonic() < deadline, "the child is still alive"
        time.sleep(0.05)


def test_progress_of_any_kind_and_an_orderly_end_raise_no_alarm():
    code = """
for _ in range(8):
    with section(DATA):
        time.sleep(0.3)
with section(SAVE), open("/dev/null", "wb", buffering=0) as file:
    for _ in range(10):
        time.sleep(0.3)
        file.write(bytes(1 << 20))
def in_other_thread():
    for _ in range(8):
        time.sleep(0.3)
        PROGRESS.beat()
thread = threading.Thread(target=in_other_thread)
thread.start()
thread.join()
watch.stop()
time.sleep(2)
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_in_a_debugger_raises_no_alarm():
    code = """
import io, pdb
class Slow:
    def readline(self):
        time.sleep(4)
        return "continue\\n"
pdb.Pdb(stdin=Slow(), stdout=io.StringIO(), readrc=False).set_trace()
watch.stop()
print("went on")
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


@pytest.mark.parametrize(
    ("reports", "named"),
    [
        (
            {0: (PASS, True), 1: (DATA, False), 2: (PASS, True)},
            "rank 1 is in the data loader, the likely cause; ranks 0, 2 are waiting for other ranks in the forward and",
        ),
        ({0: (SAVE, True), 1: (SAVE, True), 2: (SAVE, True)}, "ranks 0-2 are waiting for other ranks in a save: "),
        ({0: (START, False), 2: (PASS, True)}, "rank 1 (process 1 on elsewhere does not answer), the likely cause; r"),
    ],
)
def test_the_sentence_names_first_the_ranks_that_the_others_wait_for(reports, named):
    answers = {rank: Report(name, waits, 9.0, 4) for rank, (name, waits) in reports.items()}
    said = sentence(answers, {1: Process("elsewhere", 1)}, 3, "--hang-seconds 9", 75, "")
    assert said.startswith(f"no progress for 9 s (--hang-seconds 9), in step 4: {named}"), said


def test_ranks_are_listed_as_ranges():
    assert numbers([3]) == "rank 3" and numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_process_that_has_ended_is_called_so():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert Process(Process.own().host, child.pid).describe().endswith("has ended")


@contextlib.contextmanager
def connected(idle: list[float], decisions: list[dict], patience: float = 5.0):
    """Ranks in threads that share a store, with the given seconds without progress."""
    store = HashStore()
    ranks: list[Peers] = []

    def connect(rank: int) -> None:
        report = lambda: Report(PASS, rank == 0, idle[rank], 1)  # noqa: E731
        ranks.append(Peers(store, rank, len(idle), patience, report, decisions.append))

    for rank in range(len(idle)):
        connect(rank)
    yield ranks
    for peers in ranks:
        peers.stop()


def test_every_rank_gets_every_answer_each_time_that_one_asks():
    decisions: list[dict] = []
    with connected([7.0, 8.0, 9.0], decisions) as ranks:
        for asking in (ranks[2], ranks[0]):
            assert asking.ask()
            end = time.monotonic() + 10
            while len(decisions) < 3 and time.monotonic() < end:
                time.sleep(0.01)
            assert len(decisions) == 3
            assert all({r: a.idle for r, a in d.items()} == {0: 7.0, 1: 8.0, 2: 9.0} for d in decisions)
            decisions.clear()
        assert {rank: process.pid for rank, process in ranks[1].processes().items()}.keys() == {0, 1, 2}
    assert not any(thread.name == "hang-peers" for thread in threading.enumerate()), "would abort Python at its end"


def test_a_rank_that_does_not_answer_is_missing_and_the_others_decide_without_it():
    decisions: list[dict] = []
    store = HashStore()
    peers = Peers(store, 1, 2, 1.0, own_report, decisions.append)  # rank 0 has never connected
    assert peers.ask()
    assert [list(answers) for answers in decisions] == [[1]]
    peers.stop()


@pytest.mark.parametrize(
    ("others", "ends"),
    [
        (Report(DATA, False, 12.0, 3), True),
        (Report(SAVE, False, 2.0, 3), False),  # it still makes progress
        (Report(PASS, False, 12.0, 3, debugged=True), False),
    ],
)
def test_a_rank_ends_only_if_no_rank_makes_progress(monkeypatch, others, ends):
    ended = []
    monkeypatch.setattr(HangWatch, "_end", lambda self, reports, alone: ended.append(reports))
    monkeypatch.setattr(PROGRESS, "steps", 1)
    watch = HangWatch(10.0, 10.0, 0, 2)
    watch._decide({0: Report(PASS, True, 11.0, 3), 1: others})
    assert bool(ended) == ends
    assert ends or watch._patient_until > time.monotonic() + 5


def test_until_the_first_step_is_complete_another_limit_applies(monkeypatch):
    watch = HangWatch(5.0, 50.0, 0, 1)
    monkeypatch.setattr(PROGRESS, "steps", 0)
    assert watch.limit == 50.0
    monkeypatch.setattr(PROGRESS, "steps", 1)
    assert watch.limit == 5.0


def test_sections_are_restored_and_the_time_of_waiting_is_in_none(monkeypatch):
    PROGRESS.take_seconds()
    before = PROGRESS.place
    with section(PASS):
        with section(DATA):
            time.sleep(0.05)
        with section(None, waits=True):
            assert PROGRESS.place == Place(PASS, True)
            time.sleep(0.2)
        time.sleep(0.1)
    assert PROGRESS.place == before
    seconds = PROGRESS.take_seconds()
    assert 0.05 <= seconds[DATA] < 0.1 <= seconds[PASS] < 0.2


def test_only_the_main_thread_changes_the_section():
    places = []

    def in_thread() -> None:
        with section(SAVE):
            places.append(PROGRESS.place.section)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert places != [SAVE]


def test_the_exit_status_differs_from_those_of_python_and_of_signals():
    assert hangs.STATUS not in (0, 1, 2) and hangs.STATUS < 128
