# SPDX-License-Identifier: Apache-2.0
"""What a rank says about itself when a hang is suspected, and the sentence about all ranks."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_smar.runtime.progress import PROGRESS

_DEBUGGERS = ("bdb.py", "pdb.py", "pydevd.py", "pydevd_frame.py", "pydevd_sys_monitoring.py")
_STATES = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "D": "waits for a disk or a file server"}


@dataclass(frozen=True)
class Report:
    """A rank's answer.

    Attributes:
        section: Where it is (`runtime.progress`).
        waits: Whether it waits there for other ranks.
        idle: Seconds since it last made progress.
        step: The step that it is in, or was last; 0 before the first.
        debugged: Whether a debugger holds it.
    """

    section: str
    waits: bool
    idle: float
    step: int
    debugged: bool = False

    def to_json(self) -> str:
        """Returns the report as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Returns the report that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Process:
    """Where a rank runs, known before anything goes wrong.

    Attributes:
        host: Name of the machine.
        pid: Id of the process.
    """

    host: str
    pid: int

    @classmethod
    def own(cls) -> Process:
        """Returns this process."""
        return cls(socket.gethostname(), os.getpid())

    def describe(self) -> str:
        """Returns what is known about a process that does not answer."""
        state = self.state()
        silent = "does not answer" + (": none of its Python code runs" if self.host == socket.gethostname() else "")
        return f"process {self.pid} on {self.host} {state or silent}"

    def state(self) -> str:
        """Returns why the process cannot answer, as far as this machine knows, otherwise ""."""
        if self.host != socket.gethostname():
            return ""
        state = process_status(self.pid, "State")
        return _STATES.get(state[:1], "") if state else "has ended"


def own_report() -> Report:
    """Returns this rank's report."""
    place = PROGRESS.place
    return Report(place.section, place.waits, time.monotonic() - PROGRESS.moved, PROGRESS.step, is_debugged())


def process_status(pid: int | str, field: str) -> str:
    """Returns a field of what Linux says about a process, "" if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return dict(line.split(":", 1) for line in lines if ":" in line).get(field, "").strip()


def is_debugged() -> bool:
    """Returns whether a debugger traces this process, or stands in its main thread."""
    return process_status("self", "TracerPid") not in ("", "0") or any(
        Path(frame.f_code.co_filename).name in _DEBUGGERS
        for frame in _frames(sys._current_frames().get(threading.main_thread().ident or 0))
    )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def sentence(
    reports: Mapping[int, Report], processes: Mapping[int, Process], size: int, limit: str, status: int, why_alone: str
) -> str:
    """Returns the sentence that names which ranks are stuck where.

    Args:
        reports: Answers, by rank.
        processes: Where ranks run, by rank, as far as it is known.
        size: Number of ranks.
        limit: The flag with its value.
        status: Exit status.
        why_alone: Why other ranks were not asked, "" if they were.
    """
    idle, step = min(r.idle for r in reports.values()), max(r.step for r in reports.values())
    silent = [rank for rank in range(size) if rank not in reports]
    if why_alone:
        silent = [rank for rank in silent if rank in processes and processes[rank].state()]
    groups: dict[tuple[str, bool], list[int]] = {}
    for rank, report in sorted(reports.items()):
        groups.setdefault((report.section, report.waits), []).append(rank)
    stuck = [f"{numbers(ranks)} {_is(ranks)} in {name}" for (name, waits), ranks in groups.items() if not waits]
    waiting = [
        f"{numbers(ranks)} {_is(ranks)} waiting for other ranks in {name}"
        for (name, waits), ranks in groups.items()
        if waits
    ]
    silent_ones = [f"rank {rank} {_silent(processes.get(rank))}" for rank in silent[:8]]
    if len(silent) > 8:
        silent_ones.append(f"and so {numbers(silent[8:])}")
    # A rank that does not answer is suspected before one that is stuck, and that before those that wait for it.
    parts = [part for part in ("; ".join(silent_ones), "; ".join(stuck), "; ".join(waiting)) if part]
    if len(parts) > 1:
        parts[0] += ", the likely cause"
    elif waiting and size > 1 and not why_alone:
        parts[0] += ": compare their stacks, since none is stuck elsewhere"
    if why_alone:
        parts.append(why_alone)
    when = f"in step {step}" if step else "before the first step"
    return (
        f"no progress for {idle:.0f} s ({limit}), {when}: {'; '.join(parts)}. The stacks of every rank that "
        f"answers are in its log; this run ends with status {status}."
    )


def _is(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _silent(process: Process | None) -> str:
    return "does not answer" if process is None else f"({process.describe()})"


def numbers(ranks: Sequence[int]) -> str:
    """Returns sorted ranks as text: rank 3, ranks 0-3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
