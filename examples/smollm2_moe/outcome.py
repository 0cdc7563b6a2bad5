# SPDX-License-Identifier: Apache-2.0
"""The outcome, as the paper's Table 3: a row before stage 3 and one for each variant, in Markdown and as a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_smar.report import figures
from megatron_smar.report.numbers import aligned, decimal, percent, plain

MARKS = ("<!-- written by examples/smollm2_moe/run.py --write -->", "<!-- end of the results -->")
BEFORE = "before stage 3"
TITLES = ("stage 3", "language", "retention", "picture questions", "MRD distance")


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: Name in the table.
        language: Mean score of the language benchmarks; None if they were left out.
        retention: That divided by the mean score before stage 3.
        retention_error: One standard error of it.
        pictures: Share of the questions about held-out pictures with the exact answer.
        mrd_distance: Distance between the routing of text and of vision, mean of the MoE layers.
    """

    name: str
    language: float | None
    retention: float | None
    retention_error: float | None
    pictures: float
    mrd_distance: float

    def cells(self) -> tuple[str, ...]:
        """Returns the row's cells as text."""
        error = "" if self.retention_error is None else f" ± {100 * self.retention_error:.1f}"
        retained = percent(self.retention) + error
        return (self.name, percent(self.language), retained, percent(self.pictures), decimal(self.mrd_distance))


def make_row(name: str, results: Mapping[str, Any], language: Mapping[str, Any] | None) -> Row:
    """Returns a model's row.

    Args:
        name: Name in the table.
        results: What evaluate.py wrote.
        language: The model's part of what tools/retention.py wrote; None without language benchmarks.
    """
    distances = results["mrd_distance_by_layer"]
    average = language["average"]["value"] if language else None
    retained = language["retention"] if language else {"value": None, "stderr": None}
    pictures, distance = results["vqa_accuracy"], sum(distances) / len(distances)
    return Row(name, average, retained["value"], retained["stderr"], pictures, distance)


def make_rows(results: Mapping[str, Mapping[str, Any]], start: str, table: Mapping[str, Any] | None) -> list[Row]:
    """Returns all rows, the start of stage 3 first.

    Args:
        results: What evaluate.py wrote, by the model's name.
        start: Name of the model before stage 3.
        table: What tools/retention.py wrote; None without language benchmarks.
    """
    before = {"average": table["average_before"], "retention": {"value": 1.0, "stderr": None}} if table else None
    rows = [make_row(BEFORE, results[start], before)]
    after = table["after"] if table else {}
    return rows + [make_row(name, values, after.get(name)) for name, values in results.items() if name != start]


def markdown(rows: Sequence[Row], notes: Sequence[str], details: str) -> str:
    """Returns the table with its notes, and the language benchmarks one by one."""
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in (TITLES, *(row.cells() for row in rows))]
    rule = "|---" + "|---:" * (len(TITLES) - 1) + "|"
    return "\n".join([" ".join(notes), "", header, rule, *lines, *(["", details.strip()] if details else [])])


def terminal(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Returns the table as aligned plain text."""
    return "\n".join([*aligned([TITLES, *(row.cells() for row in rows)], left=(0,)), "", *notes])


def write(rows: Sequence[Row], notes: Sequence[str], details: str, folder: Path) -> None:
    """Writes results.json, results.md and results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = plain({"notes": list(notes), "rows": [asdict(row) for row in rows]})
    (folder / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(rows, notes, details) + "\n", encoding="utf-8")
    start, *runs = rows
    panels: dict[str, tuple[Sequence[float | None], float | None, Callable[[float | None], str]]] = {
        "picture questions": ([row.pictures for row in runs], start.pictures, percent),
        "MRD distance": ([row.mrd_distance for row in runs], start.mrd_distance, decimal),
    }
    if start.language is not None:
        panels = {"retention": ([row.retention for row in runs], start.retention, percent)} | panels
    figures.bars_by_run([row.name for row in runs], panels, BEFORE).savefig(folder / "results.png")
