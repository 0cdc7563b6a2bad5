# SPDX-License-Identifier: Apache-2.0
"""The table on the terminal and the JSON file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu.plan import STEPS, Step
from tests.gpu.runner import Row

WIDTH = 118
_INDENT = 39
_OVERRIDE = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def heading(environment: dict[str, Any]) -> str:
    """Returns the machine on which the figures were measured, in two lines, and the table's header."""
    versions = environment["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in versions if name != "torch")
    driver = environment["cards"][0]["driver_version"] if environment["cards"] else "none"
    first = (
        f"{environment['card']}, driver {driver}, torch {versions['torch']}, CUDA {environment['cuda']}, "
        f"{environment['date']}"
    )
    trial = ["Tried on the CPU: this proves nothing about a GPU."] if environment["device"] == "cpu" else []
    trial += [f"{_OVERRIDE} is set; the steps run without it."] if _OVERRIDE in environment["variables"] else []
    return "\n".join([*trial, first, packages, "", f"{'n of N':>7} {'step':14}{'result':9}{'s':>6}  figures"])


def line(row: Row, number: int, of: int) -> str:
    """Returns the line of a step, numbered from 1: its result, and its figures or its failures."""
    figures = ", ".join(f"{name} {_short(row, name)}" for name, value in row.figures.items() if not _is_long(value))
    words = "; ".join(filter(None, [row.reason, figures]))
    wrapped = textwrap.wrap(words, WIDTH - _INDENT, break_long_words=False) or [""]
    first = f"{f'{number}/{of}':>7} {row.step:14}{row.result:9}{row.seconds:6.1f}  {wrapped[0]}"
    return "\n".join([first, *(" " * _INDENT + more for more in wrapped[1:])])


def _short(row: Row, name: str) -> str:
    value = row.figures[name]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{shown} (at most {row.tolerances[name]:.4g})" if name in row.tolerances else shown


def _is_long(value: Any) -> bool:
    return isinstance(value, dict | list)


def summary(rows: Sequence[Row]) -> str:
    """Returns how many steps passed, failed and were skipped, and which failed."""
    results = [row.result for row in rows]
    counts = ", ".join(f"{results.count(kind)} {kind}" for kind in ("passed", "FAILED", "skipped"))
    failed = [row.step for row in rows if row.result == "FAILED"]
    return f"\n{counts}; {sum(row.seconds for row in rows):.0f} s" + (
        f". FAILED: {', '.join(failed)}" if failed else ""
    )


def write(path: Path, environment: dict[str, Any], rows: Sequence[Row], options: dict[str, Any]) -> None:
    """Writes the full report, with what each step shows."""
    steps = [asdict(row) | {"shows": STEPS[row.step].shows} for row in rows]
    report = {"environment": environment, "options": options, "steps": steps}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def listed(steps: Sequence[Step]) -> str:
    """Returns one line per step."""
    return "\n".join(f"{step.name:14}{step.limit:4.0f} s  {step.shows}" for step in steps)
