# SPDX-License-Identifier: Apache-2.0
"""Runs code that a model wrote, isolated and limited, and computes pass@k from it.

A program runs in a process of its own in new Linux namespaces: no network, no other processes, all files read-only
except an empty folder in memory, no standard input, none of the caller's environment variables. Time, memory, file
size and number of processes are limited. It has passed if it ran to its end, tests included. Where the kernel does not
grant this isolation nothing is run at all. What remains possible: reading files that the user can read, and a program
that is written to deceive this very check; models are scored here, attackers are not kept out.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SANDBOX = Path(__file__).with_name("code_sandbox.py")
UNAVAILABLE = 3  # exit status of the sandbox where the kernel grants no isolation
FLAG = "--allow-code-execution"
# Libraries that would start a thread per core would meet the limits of memory and processes instead.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MIB = 1 << 20


class CodeExecutionError(ValueError):
    """Generated code may not or cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall-clock time, also the limit of CPU time.
        memory: Address space in bytes.
        file_size: Size of a file in bytes; all files together may have four times as many.
        processes: Number of processes and threads.
    """

    seconds: float = 10.0
    memory: int = 2048 * MIB
    file_size: int = 16 * MIB
    processes: int = 16

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "file_size", "processes"):
            if getattr(self, name) <= 0:
                raise CodeExecutionError(f"The limit {name} is {getattr(self, name)}; it must be more than 0.")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Whether it ran to its end.
        reason: Otherwise what ended it, such as "AssertionError: "; "" if it passed.
    """

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a Python program, isolated and limited.

    Args:
        program: Source, with its tests at the end.
        limits: What it may use.

    Raises:
        CodeExecutionError: The kernel does not grant the isolation; nothing was run.
    """
    limits = limits or Limits()
    mark = secrets.token_hex(16)
    request = {
        "program": program,
        "mark": mark,
        "memory": limits.memory,
        "file_size": limits.file_size,
        "cpu_seconds": math.ceil(limits.seconds),
        "processes": limits.processes,
        "paths": [path for path in sys.path if path.endswith("site-packages")],
    }
    if sys.platform != "linux":
        raise CodeExecutionError(_refusal(f"{sys.platform} has no namespaces"))
    with tempfile.TemporaryDirectory(prefix="program-") as work:
        status, line = _start(json.dumps(request), work, limits.seconds)
    if status == UNAVAILABLE:
        raise CodeExecutionError(_refusal(line))
    if status is None:
        return Outcome(False, f"not finished after {limits.seconds:g} s")
    if line == mark:
        return Outcome(True)
    return Outcome(False, line or f"ended before the tests were done (status {status})")


def _start(request: str, work: str, seconds: float) -> tuple[int | None, str]:
    """Returns the sandbox's exit status, None if the time ran out, and the line that it wrote."""
    # -S leaves out start-up files of installed packages; the request names the folders of the packages themselves.
    command = [sys.executable, "-I", "-S", "-B", str(SANDBOX)]
    # Without it an interpreter whose libraries are in unusual places does not start.
    environment = ENVIRONMENT | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=work, env=environment, text=True, start_new_session=True, **pipes)
    try:
        line, _ = process.communicate(request, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # the kernel then kills the program, and with it everything in its namespace
        process.communicate()
        return None, ""
    return process.returncode, line.strip()


def _refusal(reason: str) -> str:
    return (
        f"This machine does not let a process run without network and with read-only files ({reason}), so code that "
        "the model wrote is not run: leave out the tasks that run code, or use a Linux kernel of version 5.12 or newer "
        "that allows user namespaces (in containers, a seccomp profile may forbid them)."
    )


@cache
def check_isolation() -> None:
    """Checks that programs run here and are isolated, before a model is loaded.

    Raises:
        CodeExecutionError: They are not; the message says why.
    """
    outcome = run_program("import socket\nassert not [name for _, name in socket.if_nameindex() if name != 'lo']")
    if not outcome.passed:
        raise CodeExecutionError(_refusal(outcome.reason))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k (Chen et al. 2021, Eq. 1).

    Args:
        samples: Number of programs for the problem.
        passed: Number of these that passed.
        k: How many programs may be tried.
    """
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


@dataclass
class CodeEval:
    """Takes the place of the metric `code_eval` that the harness would load from the hub, with the same `compute`.

    Attributes:
        limits: What each program may use.
        workers: Number of programs that run at the same time.
    """

    limits: Limits = field(default_factory=Limits)
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], list[list[Outcome]]]:
        """Runs every candidate with its problem's tests.

        Args:
            references: Tests of each problem.
            predictions: Candidates for each problem.
            k: For each of these, pass@k is computed where a problem has that many candidates.

        Returns:
            pass@k as a mean over the problems, and the outcome of each candidate.
        """
        programs = [f"{code}\n{tests}" for tests, codes in zip(references, predictions, strict=True) for code in codes]
        with ThreadPoolExecutor(self.workers) as pool:
            flat = iter(list(pool.map(lambda program: run_program(program, self.limits), programs)))
        outcomes = [[next(flat) for _ in codes] for codes in predictions]
        counts = [(len(group), sum(outcome.passed for outcome in group)) for group in outcomes]
        scores = {
            f"pass@{n}": math.fsum(pass_at_k(total, passed, n) for total, passed in counts) / len(counts)
            for n in k
            if all(total >= n for total, _ in counts)
        }
        return scores, outcomes
