# SPDX-License-Identifier: Apache-2.0
"""Programs that a model may write, among them hostile ones, against the sandbox that runs them."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from pathlib import Path

import pytest

from megatron_smar.evaluation.language import code_execution
from megatron_smar.evaluation.language.code_execution import (
    CodeEval,
    CodeExecutionError,
    Limits,
    pass_at_k,
    run_program,
)

QUICK = Limits(seconds=4.0, memory=512 << 20)


def running() -> list[bytes]:
    """The command lines of all processes."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            commands.append(path.read_bytes())
    return commands


@pytest.fixture(autouse=True)
def isolation() -> None:
    try:
        code_execution.check_isolation()
    except CodeExecutionError as error:
        pytest.skip(str(error))


def test_a_correct_program_passes_and_a_wrong_one_does_not() -> None:
    assert run_program("def add(a, b):\n    return a + b\nassert add(2, 3) == 5", QUICK).passed
    wrong = run_program("def add(a, b):\n    return a * b\nassert add(2, 3) == 5", QUICK)
    assert not wrong.passed and wrong.reason.startswith("AssertionError")


def test_a_program_may_import_installed_packages() -> None:
    assert run_program("import numpy\nassert numpy.arange(3).sum() == 3").passed


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos.kill(1, 9)\nos._exit(0)",
        "import sys\nprint('done')\nsys.stdout.flush()\nsys.exit(0)",
    ],
)
def test_ending_before_the_assertions_does_not_count_as_passed(program: str) -> None:
    assert not run_program(f"{program}\nassert False", QUICK).passed


def test_a_syntax_error_and_an_endless_recursion_are_failures() -> None:
    assert run_program("def f(:", QUICK).reason.startswith("SyntaxError")
    assert not run_program("def f():\n    return f()\nf()", QUICK).passed


@pytest.mark.parametrize("loop", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_stopped_in_time(loop: str) -> None:
    started = time.monotonic()
    outcome = run_program(loop, Limits(seconds=1.0))
    assert not outcome.passed
    assert time.monotonic() - started < 5


def test_an_endless_loop_that_catches_every_exception_is_stopped_too() -> None:
    loop = "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
    assert not run_program(loop, Limits(seconds=1.0)).passed


def test_ten_gigabytes_are_not_allocated() -> None:
    assert run_program("bytearray(10 << 30)", QUICK).reason.startswith("MemoryError")


def test_no_socket_reaches_a_server_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        exec(program, {})  # the server is there
        assert not run_program(program, QUICK).passed
        assert not run_program("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=2)", QUICK).passed


def test_a_big_file_is_not_written() -> None:
    small = Limits(seconds=4.0, file_size=1 << 20)
    assert run_program("open('a', 'wb').write(bytes(1 << 20))", small).passed
    outcome = run_program("with open('a', 'wb') as file:\n    file.write(bytes(8 << 20))\n    file.flush()", small)
    assert outcome.reason.startswith("OSError")
    many = "for n in range(64):\n    with open(str(n), 'wb') as file:\n        file.write(bytes(1 << 20))"
    assert not run_program(many, small).passed


def test_no_file_outside_its_folder_is_changed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("unchanged")
    assert not run_program(f"open({str(victim)!r}, 'w').write('changed')", QUICK).passed
    assert not run_program(f"import os\nos.remove({str(victim)!r})", QUICK).passed
    assert victim.read_text() == "unchanged"


def test_the_read_only_mounts_cannot_be_undone() -> None:
    remount = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(None, b'/', None, ctypes.c_ulong(32 | 4096), None) == 0"
    )
    assert not run_program(remount, QUICK).passed
    again = remount.replace("assert", "import os\nos.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)\nassert")
    assert not run_program(again, QUICK).passed


def test_a_fork_bomb_is_bounded() -> None:
    bomb = "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(3600)"
    outcome = run_program(bomb, QUICK)
    assert outcome.reason.startswith("BlockingIOError")
    threads = (
        "import threading, time\nfor _ in range(200):\n    threading.Thread(target=time.sleep, args=(99,)).start()"
    )
    assert not run_program(threads, QUICK).passed


@pytest.mark.parametrize("ending", ["", "\nwhile True:\n    pass"])
def test_nothing_that_a_program_started_outlives_it(ending: str) -> None:
    name = f"left-{os.getpid()}"
    left = (
        f"import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sh', ['{name}', '-c', 'sleep 60; true'])"
    )
    assert run_program(left + ending, Limits(seconds=1.0)).passed is not bool(ending)
    time.sleep(0.3)
    assert not [command for command in running() if command.startswith(name.encode())]


def test_the_program_cannot_look_at_other_processes() -> None:
    assert len(running()) > 5
    outcome = run_program("import os\nassert sum(name.isdigit() for name in os.listdir('/proc')) <= 2", QUICK)
    if "AssertionError" in outcome.reason:
        pytest.skip("parts of /proc are masked here, so that it cannot be mounted anew")
    assert outcome.passed


def test_the_program_sees_neither_environment_nor_standard_input_nor_files(monkeypatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    program = (
        "import os, sys\n"
        "assert 'A_SECRET' not in os.environ and 'HOME' not in os.environ and len(os.environ) <= 5\n"
        "assert sys.stdin.read() == ''\n"
        "assert os.listdir('.') == []\n"
        "assert len(os.listdir('/proc/self/fd')) < 10"
    )
    outcome = run_program(program, QUICK)
    assert outcome.passed, outcome.reason


def test_code_is_refused_where_the_kernel_grants_no_isolation(monkeypatch, tmp_path) -> None:
    forbidden = tmp_path / "sandbox.py"
    forbidden.write_text("import sys\nprint('unshare: Operation not permitted')\nsys.exit(3)")
    monkeypatch.setattr(code_execution, "SANDBOX", forbidden)
    with pytest.raises(CodeExecutionError, match=r"without network .*Operation not permitted.* is not run"):
        run_program("pass", QUICK)


def test_pass_at_k_is_the_probability_that_one_of_k_programs_passes() -> None:
    for samples, passed, k in ((5, 2, 1), (5, 2, 3), (10, 0, 4), (10, 9, 2), (3, 3, 1)):
        expected = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
        assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_compute_answers_as_the_metric_code_eval_does() -> None:
    good, bad = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"
    scores, outcomes = CodeEval(QUICK).compute(["assert add(2, 3) == 5"] * 2, [[good, bad], [bad, bad]], k=[1, 2, 8])
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[outcome.passed for outcome in group] for group in outcomes] == [[True, False], [False, False]]


def test_limits_that_allow_nothing_are_refused() -> None:
    with pytest.raises(CodeExecutionError, match="seconds is 0; it must be more than 0"):
        Limits(seconds=0)
