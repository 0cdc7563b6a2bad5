# SPDX-License-Identifier: Apache-2.0
"""The first error of a job among the logs of all its ranks.

Every rank's log ends with a line that says when the rank ended, and with which status (`launch.script`). The first rank
that ended with an error is the one to read: the others fail after it, in collectives that wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENDED = re.compile(r"^rank (\d+) on (\S+) ended with status (\d+) at (\S+)$", re.MULTILINE)
STARTED = re.compile(r"^rank (\d+) on (\S+) started at", re.MULTILINE)
# torchrun's last words when a signal has ended it, with status 1.
SIGNALED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")
TRACEBACK = "Traceback (most recent call last):"
TAIL = 200_000  # characters of a log that are read from its end
LINES = 30  # shown without a traceback
KILLED = {137: "killed (SIGKILL: out of memory, or by hand)", 139: "crashed (SIGSEGV)", 134: "aborted (SIGABRT)"}


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: Its number.
        node: Its node.
        status: Its exit status.
        time: When, in ISO form.
        log: Its log.
    """

    rank: int
    node: str
    status: int
    time: str
    log: Path

    def describe(self) -> str:
        """Returns a sentence."""
        how = KILLED.get(self.status, f"ended with status {self.status}")
        return f"rank {self.rank} on {self.node} {how} at {self.time}, the first of all ranks; its log is {self.log}"


def endings(folder: Path) -> tuple[list[Ending], list[Path]]:
    """Reads how the ranks ended.

    Args:
        folder: The folder of an attempt, with a log of each rank.

    Returns:
        The endings, the earliest first, and the logs without one: those ranks were ended from outside.
    """
    found, without = [], []
    for log in sorted(folder.glob("rank_*.log"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0)):
        text = _tail(log)
        ended = list(ENDED.finditer(text))
        if not ended:
            without.append(log)
            continue
        rank, node, status, time = ended[-1].groups()
        signals = SIGNALED.findall(text) if status == "1" else []
        found.append(Ending(int(rank), node, 128 + int(signals[-1]) if signals else int(status), time, log))
    return sorted(found, key=lambda ending: ending.time), without


def first_failure(ended: Sequence[Ending]) -> Ending | None:
    """Returns the first rank that ended with an error, if any. SLURM then ends the others, whose status says nothing.

    Args:
        ended: How the ranks ended, the earliest first.
    """
    return next((ending for ending in ended if ending.status), None)


def first_error(folder: Path) -> str | None:
    """Returns the first error with the lines around it; None if no rank ended with one.

    Args:
        folder: The folder of an attempt, with a log of each rank.
    """
    ended, without = endings(folder)
    failed = first_failure(ended)
    if failed is None:
        return None
    lines = [failed.describe(), "", *_around(_tail(failed.log).splitlines())]
    if without:
        lines += [
            "",
            f"{len(without)} logs have no end{_named(without)}: SLURM ended those ranks, or their node was lost",
        ]
    return "\n".join(lines)


def lost(folder: Path) -> str:
    """Returns the ranks whose logs have no end, with their nodes, in brackets; "" if there are none.

    Args:
        folder: The folder of an attempt, with a log of each rank.
    """
    return _named(endings(folder)[1])


def _named(logs: Sequence[Path]) -> str:
    """Returns the ranks of logs by node, in brackets: (node2: rank_2, rank_3)."""
    nodes: dict[str, list[str]] = {}
    for log in logs:
        with log.open(encoding="utf-8", errors="replace") as file:
            started = STARTED.match(file.readline())
        nodes.setdefault(started[2] if started else "unknown node", []).append(log.stem)
    said = [f"{node}: {', '.join(ranks[:8])}{', ...' if len(ranks) > 8 else ''}" for node, ranks in nodes.items()]
    return f" ({'; '.join(said)})" if said else ""


def _around(lines: Sequence[str]) -> list[str]:
    """Returns the first traceback of a log and what follows it, or the log's last lines."""
    starts = [number for number, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return list(lines[-LINES:])
    first = max(0, starts[0] - 3)
    end = next((n for n in range(starts[0] + 1, len(lines)) if lines[n] and not lines[n].startswith(" ")), len(lines))
    return list(lines[first : max(end + 1, first + LINES)])


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        return file.read().decode("utf-8", errors="replace")
