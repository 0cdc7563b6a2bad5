# SPDX-License-Identifier: Apache-2.0
"""What nodes have said, as lines of their output, and which groups of them have been tried."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

AGAIN = 3  # exit status of `rounds`: there are groups to try
NODE, ALL_REDUCE = "node", "all-reduce"  # kinds of groups
MARK = "preflight: "
# SLURM may cut a longer line where it mixes the output of several nodes.
LONGEST = 900
_STATUS = re.compile(r"^status (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """What a check found on a node.

    Attributes:
        node: The node's name.
        check: The check's name.
        value: What the table shows.
        fault: What is wrong and how to fix it, in one sentence; empty if it is well.
        details: Values that are compared between nodes.
    """

    node: str
    check: str
    value: str = "ok"
    fault: str = ""
    details: dict[str, str | float] = field(default_factory=dict)

    def line(self) -> str:
        """Returns the line that a node prints."""
        text = json.dumps(asdict(self))
        if len(text) > LONGEST:
            short = asdict(self) | {"fault": self.fault[: LONGEST - 300], "value": self.value[:40]}
            text = json.dumps(short)
        return MARK + text


@dataclass(frozen=True)
class Trial:
    """A group of nodes that was tried.

    Attributes:
        nodes: The nodes, the first of which is their meeting point.
        findings: What they said.
        status: Exit status of its step of SLURM; 124 or 137 at the time limit, None if it was not written.
        rest: The other lines of its output.
        log: Its output's file.
    """

    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    status: int | None
    rest: tuple[str, ...]
    log: Path

    @property
    def passed(self) -> bool:
        """Whether all its nodes have answered without a fault."""
        answered = {finding.node for finding in self.findings if not finding.fault}
        return answered == set(self.nodes) and not any(finding.fault for finding in self.findings)

    @property
    def said(self) -> str:
        """What its output says beside findings: the program's last words, else SLURM's first error; "" for nothing."""
        own = [line for line in self.rest if not line.startswith(("srun:", "slurmstepd:", "[W"))]
        slurm = [line for line in self.rest if line.startswith(("srun: error:", "slurmstepd: error:"))]
        return (own[-1:] or slurm[:1] or [""])[0][:300]

    @property
    def overdue(self) -> bool:
        """Whether it was ended at its time limit."""
        return self.status in (124, 137)


def read_trial(nodes: Sequence[str], log: Path) -> Trial:
    """Reads the output of a group of nodes; a file that is missing is one without lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    findings, rest = [], []
    for line in text.splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # a line that was cut when the node was lost
                findings.append(Finding(**json.loads(line.removeprefix(MARK))))
        elif line.strip() and not _STATUS.match(line):
            rest.append(line.strip())
    status = _STATUS.search(text)
    return Trial(tuple(nodes), tuple(findings), int(status[1]) if status else None, tuple(rest), log)


def next_groups(well: Sequence[str], tried: Iterable[Trial]) -> list[tuple[str, ...]]:
    """Returns the groups of nodes to all-reduce next; none when nothing more can be found out.

    All nodes together come first. If they fail, each node by itself and then pairs tell which node is at fault, and the
    others are tried together again.

    Args:
        well: The nodes that have passed their own checks.
        tried: The all-reduces so far.
    """
    tried = list(tried)
    passed = {trial.nodes: trial.passed for trial in tried}
    bad = failed_nodes(tried)
    remaining = tuple(node for node in well if node not in bad)
    if not remaining or passed.get(remaining):
        return []
    if remaining not in passed:
        return [remaining]
    alone: list[tuple[str, ...]] = [(node,) for node in remaining if (node,) not in passed]
    return alone or _pairs(remaining, passed)


def failed_nodes(tried: Iterable[Trial]) -> dict[str, Trial]:
    """Returns the nodes that are at fault: that fail alone, or together with a node that passes with another one."""
    tried = list(tried)
    proven = {node for trial in tried if trial.passed and len(trial.nodes) > 1 for node in trial.nodes}
    found: dict[str, Trial] = {}
    for trial in tried:
        if trial.passed or len(trial.nodes) > 2:
            continue
        suspects = [node for node in trial.nodes if node not in proven]
        if len(suspects) == 1:
            found.setdefault(suspects[0], trial)
    return found


def _pairs(nodes: tuple[str, ...], passed: dict[tuple[str, ...], bool]) -> list[tuple[str, ...]]:
    """Returns pairs that have not been tried: of each unproven node with a proven one, if there are any.

    Each is in SLURM's order, in which the run would meet, and no node is in two of them.
    """
    proven = [node for node in nodes if any(ok and len(group) == 2 and node in group for group, ok in passed.items())]
    if proven:
        unproven = [node for node in nodes if node not in proven]
        return [tuple(sorted(pair, key=nodes.index)) for pair in zip(unproven, proven, strict=False)]
    for turn in range(len(nodes)):  # as in a tournament: each meets each
        new = [pair for pair in _tournament(nodes, turn) if pair not in passed]
        if new:
            return new
    return []


def _tournament(nodes: tuple[str, ...], turn: int) -> list[tuple[str, ...]]:
    ring = [*nodes, ""] if len(nodes) % 2 else list(nodes)  # who meets nobody has a pause
    turned = ring[1 + turn :] + ring[1 : 1 + turn]
    ring = [ring[0], *turned]
    pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
    return [tuple(sorted(pair, key=nodes.index)) for pair in pairs if "" not in pair]
