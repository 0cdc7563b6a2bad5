# SPDX-License-Identifier: Apache-2.0
"""Reads the results of tools/evaluate.py: scores of benchmarks and tasks, and the routing measured with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT = "held-out questions"
# The keys of a results file; each is there if evaluate.py was asked to measure it.
KEYS = (
    "text_perplexity",
    "word_accuracy",
    "vqa_accuracy",
    "mrd_distance_by_layer",
    "expert_share",
    "benchmarks",
    "tasks",
    "language",
)
# What the lm-evaluation-harness calls its metrics of which less is better.
_ERRORS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "wer")


@dataclass(frozen=True)
class Routing:
    """The routing of one set of questions.

    Attributes:
        distances: MRD distance by number of the MoE layer; empty if it was not measured.
        shares: Share of a modality's token slots per layer and expert, [L, E], by modality; empty if not measured.
    """

    distances: Mapping[int, float] = field(default_factory=dict)
    shares: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of MoE layers and of experts per layer; 0 for one that was not measured."""
        layers = max([len(self.distances), *map(len, self.shares.values())])
        return layers, max((len(share[0]) for share in self.shares.values()), default=0)


@dataclass(frozen=True)
class Benchmark:
    """The results on one benchmark of picture questions.

    Attributes:
        title: Name in tables.
        version: Which of the published files were read.
        main_metric: The metric that the benchmark's paper reports.
        metrics: Every metric; empty where the reference answers are not published.
        asked: Number of questions.
        skipped: Number of samples that could not be asked, by reason.
        routing: The routing of the questions.
    """

    title: str
    version: str
    main_metric: str
    metrics: Mapping[str, float]
    asked: int
    skipped: Mapping[str, int]
    routing: Routing


@dataclass(frozen=True)
class Task:
    """The result on one task of the lm-evaluation-harness.

    Attributes:
        title: Name in tables.
        metric: Name of the metric.
        score: Value of the metric, in the harness's units.
        stderr: Standard error of the score; None if there is none.
        samples: Number of questions.
        shots: Number of examples in each prompt.
        version: The harness's version of the task.
        lower_is_better: Whether less is better, as for a perplexity.
        is_chat: Whether the prompts have the chat template.
    """

    title: str
    metric: str
    score: float
    stderr: float | None
    samples: int
    shots: int
    version: str
    lower_is_better: bool
    is_chat: bool


@dataclass(frozen=True)
class Results:
    """The content of a results file.

    Attributes:
        content: The content as it is in the file.
        held_out: The routing of the questions in --vqa.
        benchmarks: Results by benchmark.
        tasks: Results by task.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    held_out: Routing = Routing()
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the content of one key, or the default if evaluate.py did not write it."""
        return self.content.get(key, default)

    @property
    def routings(self) -> dict[str, Routing]:
        """The measured routings by title: of the held-out questions and of each benchmark."""
        named = {HELD_OUT: self.held_out} | {entry.title: entry.routing for entry in self.benchmarks.values()}
        return {title: routing for title, routing in named.items() if any(routing.size)}


def read_results(path: Path) -> Results:
    """Reads a results file.

    Raises:
        ValueError: The file cannot be read, or does not have the form that evaluate.py writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results of evaluate.py ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an object with results of evaluate.py.")
    if not content.keys() & set(KEYS):
        raise ValueError(f"{path} has no results of evaluate.py: it has none of the keys {', '.join(KEYS)}.")
    held_out = _parsed(path, "the routing", _routing, content)
    benchmarks = _parsed(path, "benchmarks", _table, content.get("benchmarks"))
    # The harness's results are under a key of their own, or the file has nothing else.
    tasks = _parsed(path, "tasks", lambda found: _table(found.get("tasks")), content.get("language", content))
    return Results(
        content,
        held_out,
        {name: _parsed(path, f"benchmarks.{name}", _benchmark, entry) for name, entry in benchmarks.items()},
        {name: _parsed(path, f"tasks.{name}", _task, {"title": name} | entry) for name, entry in tasks.items()},
    )


def _parsed(path: Path, place: str, parse: Any, entry: Any) -> Any:
    try:
        return parse(entry)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {place} is not in the form that evaluate.py writes ({said}).") from error


def _table(entry: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    return {name: dict(value) for name, value in (entry or {}).items()}


def _benchmark(entry: Mapping[str, Any]) -> Benchmark:
    return Benchmark(
        entry["title"],
        str(entry.get("version", "")),
        entry["main_metric"],
        {name: _number(value) for name, value in entry["metrics"].items()},
        int(entry["asked"]),
        Counter(sample["reason"] for sample in entry.get("skipped", ())),
        _routing(entry.get("routing") or {}),
    )


def _task(entry: Mapping[str, Any]) -> Task:
    metric = entry["metric"].removesuffix(",none")  # the harness's name for "no filter"
    return Task(
        entry["title"],
        metric,
        _number(entry["score"]),
        None if entry.get("stderr") is None else _number(entry["stderr"]),
        int(entry["samples"]),
        int(entry["shots"]),
        str(entry["version"]),
        not entry.get("higher_is_better", metric.partition(",")[0] not in _ERRORS),
        bool(entry.get("chat_template")),
    )


def _routing(entry: Mapping[str, Any]) -> Routing:
    distances = {layer: _number(value) for layer, value in _by_layer(entry.get("mrd_distance_by_layer") or {}).items()}
    # A model without MoE layers has none of its modalities' shares.
    shares = {kind: _share(kind, share) for kind, share in (entry.get("expert_share") or {}).items() if share}
    if len({(len(share), len(share[0])) for share in shares.values()}) > 1:
        raise ValueError("the modalities in expert_share have different numbers of layers or experts")
    return Routing(distances, shares)


def _share(kind: str, share: Any) -> list[list[float]]:
    rows = [[_number(value) for value in row] for row in _by_layer(share).values()]
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError(f"expert_share of {kind} is not a table of layers and experts")
    return rows


def _by_layer(values: Any) -> dict[int, Any]:
    """Returns values by number of the layer, from an object by number or a list from layer 1."""
    if isinstance(values, Mapping):
        return dict(sorted((int(layer), value) for layer, value in values.items()))
    return dict(enumerate(values, 1))


def _number(value: Any) -> float:
    """Converts a number; null stands for one that could not be measured."""
    return float(np.nan if value is None else value)
