# SPDX-License-Identifier: Apache-2.0
"""The scores of several results side by side: a column for each benchmark and task, with the best score of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_smar.report.numbers import is_finite
from megatron_smar.report.results import Results


class Score(NamedTuple):
    """A score, its standard error (None: there is none), and the number of questions it was measured on."""

    value: float
    stderr: float | None
    questions: int


class _Kind(NamedTuple):
    """What scores have in common if they can be compared: everything but the model.

    Attributes:
        name: Key of the benchmark or task.
        title: Name, metric and number of examples in the prompt, for the reader.
        version: Version of the benchmark or task.
        digits: Number of decimals that are shown.
        lower_is_better: Whether less is better.
    """

    name: str
    title: str
    version: str
    digits: int
    lower_is_better: bool


@dataclass(frozen=True)
class Column:
    """The scores on one benchmark or task.

    Attributes:
        title: Benchmark or task, metric and number of examples in the prompt.
        digits: Number of decimals that are shown.
        lower_is_better: Whether less is better.
        scores: Scores by name of the run; a run that was not measured is left out.
    """

    title: str
    digits: int
    lower_is_better: bool
    scores: Mapping[str, Score]

    @property
    def is_comparable(self) -> bool:
        """Whether all runs answered the same number of questions."""
        return len({score.questions for score in self.scores.values()}) <= 1

    @property
    def best(self) -> set[str]:
        """The runs with the best score, as it is shown; empty if there is nothing to compare."""
        known = {name: score.value for name, score in self.scores.items() if is_finite(score.value)}
        found = {name: round(value, self.digits) for name, value in known.items()}
        if len(found) < 2 or not self.is_comparable:
            return set()
        best = (min if self.lower_is_better else max)(found.values())
        return {name for name, value in found.items() if value == best}

    def cell(self, name: str) -> str:
        """Formats a run's score with its standard error; "-" if it was not measured."""
        score = self.scores.get(name)
        if score is None or not is_finite(score.value):
            return "-"
        error = f" ± {score.stderr:,.{self.digits}f}" if is_finite(score.stderr) else ""
        return f"{score.value:,.{self.digits}f}{error}"


def columns(results: Mapping[str, Results]) -> list[Column]:
    """Returns a column for each benchmark and task that was scored in at least one of the results.

    Scores of different versions, metrics or numbers of examples in the prompt are in different columns.

    Args:
        results: Results by name of the run.
    """
    found: dict[_Kind, dict[str, Score]] = defaultdict(dict)
    for name, run in results.items():
        for kind, score in _scores(run):
            found[kind][name] = score
    titles = Counter(kind.title for kind in found)
    return [
        Column(
            kind.title + (f", version {kind.version}" if titles[kind.title] > 1 else ""),
            kind.digits,
            kind.lower_is_better,
            scores,
        )
        for kind, scores in found.items()
    ]


def _scores(results: Results) -> Iterator[tuple[_Kind, Score]]:
    for name, entry in results.benchmarks.items():
        if entry.main_metric in entry.metrics:
            kind = _Kind(name, f"{entry.title}, {entry.main_metric}", entry.version, 2, False)
            yield kind, Score(entry.metrics[entry.main_metric], None, entry.asked)
    for name, task in results.tasks.items():
        title = f"{task.title}, {task.metric}, {task.shots}-shot{', chat template' if task.is_chat else ''}"
        yield _Kind(name, title, task.version, 3, task.lower_is_better), Score(task.score, task.stderr, task.samples)
