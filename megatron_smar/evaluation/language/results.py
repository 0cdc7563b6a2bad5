# SPDX-License-Identifier: Apache-2.0
"""Scores on language benchmarks as they are saved: what was asked, how, and the score with its standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

KEY = "language"  # of these results within the results of `evaluate`


class ResultsError(ValueError):
    """Results are unusable; the message is one sentence for the user."""


@dataclass(frozen=True)
class TaskResult:
    """The score of one task.

    Attributes:
        title: The task's name in tables.
        metric: The harness's name of the main metric and its filter, such as "acc,none".
        score: The main metric, as the harness reports it: most are shares from 0 to 1.
        stderr: Its standard error; None where the harness computes none.
        samples: Number of questions.
        version: The harness's version of the task.
        shots: Number of examples in each prompt.
        chat_template: Whether the prompts are conversations.
        prompts: Digest of all prompts; None where one process does not see them all.
        higher_is_better: Whether a higher score is better.
        metrics: Every metric of the harness, with its standard error.
        subtasks: Score of each member of a group of tasks.
    """

    title: str
    metric: str
    score: float
    stderr: float | None
    samples: int
    version: str
    shots: int
    chat_template: bool
    prompts: str | None = None
    higher_is_better: bool = True
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    subtasks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {"score": self.score, "samples": self.samples, "stderr": self.stderr or 0.0}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ResultsError(f"The {name} of {self.title} is {value!r}; it must be a finite number.")
        if self.samples < 1 or (self.stderr or 0.0) < 0:
            raise ResultsError(
                f"{self.title} has {self.samples} samples and the standard error {self.stderr}; there must be at least "
                "one sample, and the error must not be negative."
            )


@dataclass(frozen=True)
class LanguageResults:
    """The scores of one model.

    Attributes:
        harness: The harness and its version.
        tasks: Result of each task, by its name in the harness.
        limit: Number of questions to which each task was limited, if any.
    """

    harness: str
    tasks: Mapping[str, TaskResult]
    limit: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what is saved as JSON."""
        return {"harness": self.harness, "limit": self.limit, "tasks": {n: asdict(t) for n, t in self.tasks.items()}}


def parse_results(content: Any, name: str) -> LanguageResults:
    """Reads the scores from parsed JSON: of the language benchmarks only, or all results of `evaluate`.

    Args:
        content: The parsed JSON.
        name: The file's name, for messages.

    Raises:
        ResultsError: There are no such scores in it.
    """
    content = content.get(KEY, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise ResultsError(f"{name} has no scores of language benchmarks; write them with evaluate.py --tasks.")
    known = {item.name for item in fields(TaskResult)}
    tasks = {}
    for task, values in content["tasks"].items():
        try:
            tasks[task] = TaskResult(**{key: value for key, value in values.items() if key in known})
        except (TypeError, AttributeError, ResultsError) as error:
            raise ResultsError(f"{name}: the result of {task} cannot be read: {error}") from None
    return LanguageResults(str(content.get("harness", "")), tasks, content.get("limit"))


def read_results(path: Path) -> LanguageResults:
    """Reads the scores from a file.

    Raises:
        ResultsError: The file is not readable or has no such scores.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}.") from None
    return parse_results(content, str(path))


def format_results(results: LanguageResults) -> str:
    """Returns the scores as a table for the terminal; shares are shown in percent."""
    rows: list[tuple[str, ...]] = [("task", "score", "± s.e.", "questions", "shots", "metric")]
    for name, task in results.tasks.items():
        error = "" if task.stderr is None else f"{100 * task.stderr:.2f}"
        title = task.title if task.title == name else f"{task.title} ({name})"
        row = (title, f"{100 * task.score:.2f}", error, f"{task.samples:,}", f"{task.shots}")
        rows.append((*row, task.metric))
    return align(rows, left=(0, 5))


def align(rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    """Returns rows as lines with aligned columns.

    Args:
        rows: The cells, the first row with the titles.
        left: Columns that are aligned to the left; the others are numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
