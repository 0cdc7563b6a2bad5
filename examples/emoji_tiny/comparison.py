# SPDX-License-Identifier: Apache-2.0
"""The comparison of stage 2's variants: one run of each, as JSON, Markdown, figure and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demo_content import comparison
from stages import BEFORE, VariantRun, crossing, results_of

from megatron_smar.report import figures
from megatron_smar.report.numbers import aligned, decimal, is_finite, percent, plain

MARKS = ("<!-- written by examples/emoji_tiny/compare.py --write -->", "<!-- end of the comparison -->")
START = "before stage 2"


class Column(NamedTuple):
    """A measure: its key in a row, its title, its format, and whether the start of stage 2 has it too."""

    key: str
    title: str
    form: Callable[[float | None], str]


def _seconds(value: float | None) -> str:
    return f"{value:.0f}" if is_finite(value) else "-"


COLUMNS = (
    Column("retention", "retention", percent),
    Column("text_perplexity", "text perplexity", decimal),
    Column("vqa_accuracy", "picture questions", percent),
    Column("msi", "MSI", decimal),
    Column("mrd_distance", "MRD distance", decimal),
    Column("crossing", "crossing", percent),
    Column("crossing_placed", "crossing, placed", percent),
    Column("seconds", "seconds of stage 2", _seconds),
    Column("cpu_seconds", "CPU seconds", _seconds),
)

Row = Mapping[str, Any]

_OF_VARIANTS = ("seconds", "cpu_seconds", "crossing", "crossing_placed")


def rows_of(runs: Sequence[VariantRun]) -> list[dict[str, Any]]:
    """Returns the numbers before stage 2 and after each variant of it; all variants have the same shared steps."""
    before = results_of(runs[0].demo.steps[BEFORE])
    start = _row(comparison(START, before, before)) | _of(None)
    return [start, *(_row(comparison(run.variant.label, before, run.results)) | _of(run) for run in runs)]


def _row(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers | {"text_perplexity": numbers.pop("text_perplexity_after")}


def _of(run: VariantRun | None) -> dict[str, Any]:
    """Returns a variant's settings, its time and what crosses devices; None stands for the start of stage 2."""
    if run is None:
        return {"flags": {}, "is_current": True} | dict.fromkeys(_OF_VARIANTS)
    share = crossing(run.placement)
    crosses = {"crossing": share["before"], "crossing_placed": share["after"]}
    spent = {"seconds": run.stage2.seconds, "cpu_seconds": run.stage2.cpu_seconds}
    return {"flags": dict(run.variant.flags), **spent, **crosses, "is_current": run.is_current}


def _measured(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns of which at least one row has a value."""
    return [column for column in COLUMNS if any(is_finite(row[column.key]) for row in rows)]


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    columns = _measured(rows)
    names = [row["routing"] + ("" if row["is_current"] else " *") for row in rows]
    cells = [[column.form(row[column.key]) for column in columns] for row in rows]
    header = ("stage 2", *(column.title for column in columns))
    return [header, *((name, *line) for name, line in zip(names, cells, strict=True))]


def notes(rows: Sequence[Row], seed: int) -> list[str]:
    """Returns what a reader of the table must know, in sentences."""
    said = [f"One run of each, seed {seed}: differences of a few points may be chance."]
    if not all(row["is_current"] for row in rows):
        said.append("Rows with * were made by another version of the code, from the same settings and data.")
    return said


def terminal_table(rows: Sequence[Row], seed: int) -> str:
    """Returns the table as aligned plain text."""
    return "\n".join([*aligned(_cells(rows), left=(0,)), "", *notes(rows, seed)])


def markdown_table(rows: Sequence[Row], seed: int, command: str) -> str:
    """Returns the table in Markdown, with the command that makes it."""
    header, *lines = ["| " + " | ".join(line) + " |" for line in _cells(rows)]
    rule = "|---" + "|---:" * (header.count("|") - 2) + "|"
    return "\n".join([f"`{command}`. {' '.join(notes(rows, seed))}", "", header, rule, *lines])


def write_comparison(rows: Sequence[Row], seed: int, command: str, folder: Path) -> None:
    """Writes compare.json, compare.md and compare.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = plain({"command": command, "seed": seed, "notes": notes(rows, seed), "rows": rows})
    (folder / "compare.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown_table(rows, seed, command) + "\n", encoding="utf-8")
    start, *runs = rows
    shown = [column for column in _measured(rows) if column.key != "seconds"]  # those depend on the machine's load
    panels = {column.title: ([row[column.key] for row in runs], start[column.key], column.form) for column in shown}
    figures.bars_by_run([row["routing"] for row in runs], panels, START).savefig(folder / "compare.png")
