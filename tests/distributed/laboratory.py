# SPDX-License-Identifier: Apache-2.0
"""Runs jobs of steps.py, as many as possible in one program, since importing Megatron takes longer than most jobs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch import run

IDLE = 120  # seconds without output after which a job is considered hung


def run_jobs(jobs: Sequence[dict[str, Any]], ranks: int, listed: Path) -> None:
    """Runs jobs in one launch; after a job that fails or hangs, the remaining jobs run in another launch.

    Args:
        jobs: The jobs, in the form of steps.py.
        ranks: Number of processes.
        listed: File for the list of jobs.
    """
    listed.write_text(json.dumps(jobs))
    while pending := [Path(job["folder"]) for job in jobs if not _is_over(Path(job["folder"]))]:
        done = run("tests/distributed/steps.py", listed, ranks=ranks, check=False, idle=IDLE)
        left = [folder for folder in pending if not _is_over(folder)]
        if left and not any((folder / "error.txt").exists() for folder in pending):
            left[0].mkdir(exist_ok=True)
            (left[0] / "error.txt").write_text(f"hung for {IDLE} s, or died:\n{done.stdout[-3000:]}")


def read_values(folder: Path) -> list[dict[str, float]]:
    """Returns what a job logged in each step."""
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    return json.loads((folder / "values.json").read_text())


def _is_over(folder: Path) -> bool:
    """Whether a job has ended, successfully or not."""
    return any((folder / name).exists() for name in ("values.json", "error.txt"))
