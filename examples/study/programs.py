# SPDX-License-Identifier: Apache-2.0
"""Programs of the project in a fork of this process, which has imported what they import, and locks between processes.

The imports take ten seconds.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from pipeline import ROOT
from steps import StepError, run_program


def run_alone(command: Sequence[str], log: Path) -> None:
    """Runs a program in one process with one thread, from the project's folder; two of them share two cores best.

    Args:
        command: The program and its arguments.
        log: File for the output.

    Raises:
        StepError: The program failed.
    """
    if os.environ.get("MEGATRON_SMAR_DEVICE") == "cuda":  # which does not survive a fork
        run_program([sys.executable, *command], log, ROOT, threads=1, shows_progress=False)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    process = get_context("fork").Process(target=_become, args=(list(command), log))
    process.start()
    process.join()
    if process.exitcode:
        raise StepError(f"{log.stem} failed; its output is in {log}.")


def _become(command: list[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv, sys.path[0] = command, str((ROOT / command[0]).parent)
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out while one makes what is in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
