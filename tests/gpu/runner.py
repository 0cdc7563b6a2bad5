# SPDX-License-Identifier: Apache-2.0
"""Runs the steps one after another, each with its own time limit; a failed step does not affect the others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.gpu.context import ROOT, Context, Device
from tests.gpu.plan import FILES, Step
from tests.gpu.programs import base_environment, device_variables, error_line, read_json

_SLOWER = 4  # factor of the limits on the CPU: they are for a machine with a GPU, not for two shared cores

Result = Literal["passed", "FAILED", "skipped"]


@dataclass
class Row:
    """One line of the report.

    Attributes:
        reason: Why the step failed, or what a skipped step needs.
    """

    step: str
    result: Result
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Settings from the command line; see `Context`.

    Attributes:
        folder: Folder of the steps' folders.
        seconds: Time limit for all steps together.
    """

    device: Device
    quick: bool
    ranks: int
    factor: float
    folder: Path
    seconds: float


_RUNNING: set[int] = set()  # process groups of steps


def run_steps(steps: Sequence[Step], settings: Settings, show: Callable[[Row, float], None]) -> list[Row]:
    """Runs the steps; `show` is called after each with the maximum remaining seconds.

    Steps that only compare run several at a time if there are enough processors: they mostly wait for imports.
    """
    end = time.monotonic() + settings.seconds
    rows: list[Row] = []
    threads = ThreadPoolExecutor(max(1, min(3, (os.cpu_count() or 1) // 4)))
    try:
        for _, group in itertools.groupby(enumerate(steps), lambda item: item[0] if item[1].alone else -1):
            made = all(row.result == "passed" for row in rows if row.step == FILES)
            begin = functools.partial(_run_step, settings=settings, end=end, files_made=made)
            for row in threads.map(begin, [step for _, step in group]):
                rows.append(row)
                left = sum(step.limit for step in steps[len(rows) :])
                show(row, min(left, end - time.monotonic()))
    except BaseException:  # also Ctrl-C: running steps are in separate process groups
        threads.shutdown(wait=False, cancel_futures=True)
        for running in list(_RUNNING):
            _kill(running)
        raise
    return rows


def _run_step(step: Step, settings: Settings, end: float, files_made: bool) -> Row:
    left = end - time.monotonic()
    missing = step.missing(settings.device, settings.ranks)
    if missing:
        return Row(step.name, "skipped", reason=f"needs {missing}")
    if step.needs_files and not files_made:
        return Row(step.name, "FAILED", reason=f"did not run, because the step {FILES} failed")
    if left < 1:
        return Row(step.name, "FAILED", reason=f"did not run: the {settings.seconds:.0f} s for all steps are over")
    limit = step.limit * (_SLOWER if settings.device == "cpu" else 1)
    return _run_in_a_process(step, settings, min(left, limit))


def _run_in_a_process(step: Step, settings: Settings, limit: float) -> Row:
    folder = settings.folder / step.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = (settings.device, settings.quick, settings.ranks, settings.factor)
    Context(*place, folder, settings.folder / FILES).save(folder / "context.json")
    result, log, begin = folder / "result.json", folder / "step.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", step.place, str(folder / "context.json"), str(result)],
            cwd=ROOT,
            env=base_environment() | device_variables(settings.device),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _RUNNING.add(process.pid)
        try:
            process.wait(timeout=limit)
            over = False
        except subprocess.TimeoutExpired:
            over = True
        finally:
            _kill(process.pid)  # also its child processes: ranks, which wait for each other, and data workers
            process.wait()
            _RUNNING.discard(process.pid)
    row = Row(step.name, "FAILED", time.monotonic() - begin)
    if over:
        row.reason = f"took longer than its {limit:.0f} s [{log}]"
    elif not result.is_file():
        words = error_line(log.read_text(encoding="utf-8", errors="replace"))
        row.reason = f"its process died (exit status {process.returncode}): {words} [{log}]"
    else:
        found = read_json(result)
        row.figures, row.tolerances = found["figures"], found["tolerances"]
        row.reason = "; ".join(found["failures"])
        row.result = "FAILED" if found["failures"] else "passed"
    return row


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
