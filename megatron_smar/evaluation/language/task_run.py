# SPDX-License-Identifier: Apache-2.0
"""Runs loaded tasks of the lm-evaluation-harness on a model and returns the scores."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_smar.evaluation.language.local_data import local_metrics
from megatron_smar.evaluation.language.results import LanguageResults, TaskResult, align
from megatron_smar.evaluation.language.task_config import PRESET_TASKS, LanguageConfig, TaskError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SEED = 1234  # the harness's default for the choice of examples
BOOTSTRAPS = 1000  # for the few metrics that are no means


@dataclass(frozen=True)
class Scored:
    """What has a score of its own: a task, or a group of tasks whose scores are averaged.

    Attributes:
        requested: The name under which it was requested.
        name: Its name in the harness.
        tasks: The harness's task objects in it.
        group: The harness's group; None for a task.
    """

    requested: str
    name: str
    tasks: Sequence[Any]
    group: Any = None

    @property
    def title(self) -> str:
        """Its name in tables: the paper's, if it is of the preset."""
        return PRESET_TASKS[self.name].title if self.name in PRESET_TASKS else self.name

    @property
    def version(self) -> str:
        """The harness's version of it."""
        stated = str(self.tasks[0].VERSION if self.group is None else self.group.version)
        return "none" if stated in ("Yaml", "N/A") else stated  # the harness's words for a file without a version

    @property
    def shots(self) -> int:
        """Number of examples in each prompt."""
        return max(task.get_config("num_fewshot") or 0 for task in self.tasks)

    @property
    def metric(self) -> str:
        """The main metric and its filter: the declared one; for other tasks the first that the harness's file lists."""
        if self.name in PRESET_TASKS:
            return PRESET_TASKS[self.name].metric
        listed = (self.group.aggregate_metric_list or []) if self.group is not None else []
        first = listed[0].metric if listed else next(iter(self.tasks[0].aggregation()))
        return f"{first},{self.tasks[0]._filters[0].name}"


@dataclass(frozen=True)
class LanguageTasks:
    """Loaded tasks, ready to be run.

    Attributes:
        config: What is evaluated.
        loaded: For each requested name, the harness's `TaskDict`.
    """

    config: LanguageConfig
    loaded: Mapping[str, Mapping[str, Any]]

    def scored(self) -> Iterator[Scored]:
        """Yields what has a score of its own."""
        for name, loaded in self.loaded.items():
            groups = loaded.get("groups") or {}
            yield from _scored(name, [groups[name]] if name in groups else loaded["tasks"].values())

    def table(self) -> str:
        """Returns the tasks with shots, chat template, version and main metric as a table for the terminal."""
        rows: list[tuple[str, ...]] = [("task", "shots", "chat", "version", "metric", "questions")]
        for item in self.scored():
            preset = PRESET_TASKS.get(item.name)
            tested = f" (tested: {preset.version})" if preset and preset.version != item.version else ""
            title = f"{item.title} ({item.name})" if preset else item.name
            chat = "yes" if self.config.uses_chat(item.requested) else "no"
            questions = sum(len(task.eval_docs) for task in item.tasks)
            rows.append((title, str(item.shots), chat, item.version + tested, item.metric, f"{questions:,}"))
        return align(rows, left=(0, 4))

    def run(self, model: LM) -> LanguageResults | None:
        """Evaluates a model.

        Args:
            model: The harness's interface to the model.

        Returns:
            The scores, on the process of the model's `rank` 0; None on the others.

        Raises:
            TaskError: The harness does not report the main metric.
            DataError: The script of a metric is not in the folder.
        """
        from lm_eval.evaluator import evaluate

        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks of a process that has a device
        scores: dict[str, Any] = {}
        for chat in (False, True):
            merged = self._merged(chat)
            if not merged["tasks"]:
                continue
            random.seed(SEED)
            for task in merged["tasks"].values():
                task.set_fewshot_seed(seed=SEED)  # here, so that a second model gets the same examples
            _seed_language_detection()
            # Some tasks load their metric's script only when they compute it.
            with one_progress_bar(len(merged["tasks"])), local_metrics(self.config.folder):
                part = evaluate(
                    model,
                    merged,
                    limit=self.config.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    confirm_run_unsafe_code=self.config.allow_code_execution,
                )
            if part is not None:
                scores |= part["results"]
        if model.rank != 0:
            return None
        tasks = {item.name: self._result(item, scores, model.world_size == 1) for item in self.scored()}
        return LanguageResults(f"lm_eval {version('lm_eval')}", tasks, self.config.limit)

    def _merged(self, chat: bool) -> dict[str, Any]:
        """Returns one `TaskDict` of all tasks with, or without, a chat template."""
        merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name, loaded in self.loaded.items():
            if self.config.uses_chat(name) is chat:
                for key, values in merged.items():
                    values.update(loaded.get(key) or {})
        return merged

    def _result(self, item: Scored, scores: Mapping[str, Any], sees_all_prompts: bool) -> TaskResult:
        own, metric = scores[item.name], item.metric
        if metric not in own:
            listed = ", ".join(key for key in own if "," in key and "_stderr," not in key)
            raise TaskError(f"The harness reports no metric {metric} of {item.name}, only {listed}.")
        main, _, picked = metric.partition(",")
        members = {task.task_name: scores[task.task_name] for task in item.tasks if item.group is not None}
        return TaskResult(
            title=item.title,
            metric=metric,
            score=float(own[metric]),
            stderr=_number(own.get(f"{main}_stderr,{picked}")),
            samples=int(own["sample_len"]),
            version=item.version,
            shots=item.shots,
            chat_template=self.config.uses_chat(item.requested),
            prompts=_digest(item.tasks) if sees_all_prompts else None,
            higher_is_better=all(task.higher_is_better().get(main, True) for task in item.tasks),
            metrics={key: _number(value) for key, value in own.items() if "," in key},
            subtasks={name: float(score[metric]) for name, score in members.items() if metric in score},
        )


@contextmanager
def one_progress_bar(tasks: int) -> Iterator[None]:
    """Shows one progress bar over the tasks whose prompts are built, where the harness shows one for each task."""
    from lm_eval.api import task

    original = task.tqdm
    with tqdm(total=tasks, desc="building prompts", unit="task", disable=not is_first_process()) as bar:

        def counted(items: Iterable[Any], **_: Any) -> Iterator[Any]:
            yield from items
            bar.update()
            if bar.n == tasks:
                bar.close()  # before the model's own bars begin

        task.tqdm = counted
        try:
            yield
        finally:
            task.tqdm = original


def is_first_process() -> bool:
    """Returns whether this process is the one that shows progress."""
    return os.environ.get("RANK", "0") == "0"


def _scored(requested: str, items: Iterable[Any]) -> Iterator[Scored]:
    """Yields tasks and the groups that have a score; for other groups, their members."""
    for item in items:
        if not hasattr(item, "get_all_tasks"):
            yield Scored(requested, item.task_name, [item])
        elif item.has_aggregation:
            yield Scored(requested, item.name, item.get_all_tasks(), item)
        else:
            yield from _scored(requested, item)


def _number(value: Any) -> float | None:
    """Returns a number as a float, and None for the harness's "N/A"."""
    return None if value is None or isinstance(value, str) else float(value)


def _digest(tasks: Sequence[Any]) -> str:
    """Returns a digest of all prompts and answer options, with the examples in them."""
    digest = hashlib.sha256()
    for task in sorted(tasks, key=lambda task: task.task_name):
        for instance in task.instances:
            digest.update(repr(instance.args).encode(errors="replace"))
    return digest.hexdigest()[:16]


def _seed_language_detection() -> None:
    """Makes IFEval's detection of a text's language give the same answer in each run."""
    try:
        from langdetect import DetectorFactory
    except ImportError:  # only IFEval needs it
        return
    DetectorFactory.seed = 0
