# SPDX-License-Identifier: Apache-2.0
"""The attempts at a run, over requeued jobs and over the jobs of a chain, and whether they make progress.

Each job's folder has its attempts' history, `attempts.json`; a job of a chain begins with its predecessor's.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Attempts in a row that may end without a new checkpoint; after the last there is no other.
ATTEMPTS = 3
HISTORY = "attempts.json"
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, in the folder of a run's checkpoints
_AFTER = re.compile(r"after(?:any|ok|notok):(\d+)(?:\+\d+)?")


@dataclass(frozen=True)
class Attempt:
    """An attempt.

    Attributes:
        job: The job's number.
        attempt: Its folder's name, `attempt_0`.
        start: The step of the newest checkpoint when it began, "" without one.
        end: That step when it ended; None while it runs, or if its node was lost.
        status: Its exit status; None likewise.
    """

    job: str
    attempt: str
    start: str
    end: str | None = None
    status: int | None = None


def step_in(save: Path) -> str:
    """Returns the step of the newest checkpoint, `release` for an import, or "" without one."""
    tracker = save / TRACKER
    return tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""


def read_history(folder: Path) -> list[Attempt]:
    """Returns the attempts of a job, and of its predecessors in a chain.

    Args:
        folder: The job's folder.
    """
    file = folder / HISTORY
    return [Attempt(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def begin(attempt: Path, save: Path, after: str) -> list[Attempt]:
    """Records that an attempt begins.

    Args:
        attempt: Its folder.
        save: Folder of the run's checkpoints.
        after: The job's dependency in SLURM's form, such as afterany:12; "" without one.

    Returns:
        The attempts before it.
    """
    job = attempt.parent
    history = read_history(job)
    previous = _AFTER.fullmatch(after)
    if not history and previous:
        history = read_history(job.parent / previous[1])
    _write(job, [*history, Attempt(job.name, attempt.name, step_in(save))])
    return history


def end(attempt: Path, save: Path, status: int) -> list[Attempt]:
    """Records how an attempt ended, and returns all of them.

    Args:
        attempt: Its folder.
        save: Folder of the run's checkpoints.
        status: Its exit status.
    """
    job, step = attempt.parent, step_in(save)
    history = read_history(job)
    if history and (history[-1].job, history[-1].attempt) == (job.name, attempt.name):
        history[-1] = replace(history[-1], end=step, status=status)
    else:
        history.append(Attempt(job.name, attempt.name, step, step, status))
    _write(job, history)
    return history


def stuck(history: list[Attempt], step: str) -> bool:
    """Returns whether the last attempts all began at a step and have not come further."""
    last = history[-ATTEMPTS:]
    return len(last) == ATTEMPTS and all(attempt.start == step for attempt in last)


def _write(job: Path, history: list[Attempt]) -> None:
    job.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(attempt) for attempt in history], indent=1) + "\n"
    (job / HISTORY).write_text(text, encoding="utf-8")
