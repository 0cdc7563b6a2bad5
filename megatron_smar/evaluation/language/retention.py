# SPDX-License-Identifier: Apache-2.0
"""Which share of its language scores a model retains after training: the paper's Table 2, with standard errors.

The retention of a task is score after / score before. That of the average is mean after / mean before, as in the
paper, not the mean of the tasks' ratios. Standard errors are the harness's, carried to sums and ratios to first order
(the delta method) as if all scores were independent. Before and after answer the same questions, so their errors are
positively correlated and the errors of the ratios are too large rather than too small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smar.evaluation.language.results import LanguageResults, ResultsError, TaskResult

# The paper's Table 2 leaves them out: they measure how well instructions are followed, which training improves.
NOT_AVERAGED = ("humaneval", "ifeval")


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        value: The number, a share.
        stderr: Its standard error; None if the harness gave none for a score in it.
    """

    value: float
    stderr: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Returns what is saved as JSON."""
        return {"value": self.value, "stderr": self.stderr}

    def percent(self, digits: int = 1) -> str:
        """Returns it in percent, with its standard error if it has one."""
        error = "" if self.stderr is None else f" ± {100 * self.stderr:.{digits}f}"
        return f"{100 * self.value:.{digits}f}{error}"


def mean(numbers: Sequence[Estimate]) -> Estimate:
    """Returns the mean of independent numbers."""
    count = len(numbers)
    errors = [number.stderr for number in numbers]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(math.fsum(error**2 for error in known)) / count if len(known) == count else None
    return Estimate(math.fsum(number.value for number in numbers) / count, stderr)


def ratio(after: Estimate, before: Estimate) -> Estimate:
    """Returns after / before of independent numbers, its standard error by the delta method."""
    value = after.value / before.value
    if after.stderr is None or before.stderr is None:
        return Estimate(value, None)
    return Estimate(value, math.hypot(after.stderr, value * before.stderr) / before.value)


@dataclass(frozen=True)
class Model:
    """One model's scores after training, compared with those before.

    Attributes:
        name: The model's name in the table.
        scores: Score after, by task.
        ratios: Retention, by task.
        average: Mean of the scores after, over the averaged tasks.
        retention: Mean after / mean before.
        without: `retention` with one task left out, by this task.
    """

    name: str
    scores: Mapping[str, Estimate]
    ratios: Mapping[str, Estimate]
    average: Estimate
    retention: Estimate
    without: Mapping[str, Estimate]


@dataclass(frozen=True)
class Retention:
    """The table: scores before, and each model after.

    Attributes:
        titles: Title of each task, in order.
        averaged: The tasks that are averaged.
        before: Score before, by task.
        average: Mean of the scores before, over the averaged tasks.
        models: The models after training.
    """

    titles: Mapping[str, str]
    averaged: Sequence[str]
    before: Mapping[str, Estimate]
    average: Estimate
    models: Sequence[Model]

    def lead(self, left_out: str | None = None) -> tuple[str, float] | None:
        """Returns the model with the highest retention and its margin to the second; None for a single model.

        Args:
            left_out: The task that is left out of the average, if any.
        """
        values = [(m.retention if left_out is None else m.without[left_out]).value for m in self.models]
        ranked = sorted(zip(values, self.models, strict=True), key=lambda pair: -pair[0])
        return (ranked[0][1].name, ranked[0][0] - ranked[1][0]) if len(ranked) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Returns what is saved as JSON."""
        models = {
            model.name: {
                "scores": {task: score.as_dict() for task, score in model.scores.items()},
                "retention_by_task": {task: value.as_dict() for task, value in model.ratios.items()},
                "average": model.average.as_dict(),
                "retention": model.retention.as_dict(),
                "retention_without": {task: value.as_dict() for task, value in model.without.items()},
            }
            for model in self.models
        }
        return {
            "tasks": dict(self.titles),
            "averaged": list(self.averaged),
            "before": {task: score.as_dict() for task, score in self.before.items()},
            "average_before": self.average.as_dict(),
            "after": models,
        }


def retention(
    before: LanguageResults, after: Mapping[str, LanguageResults], tasks: Sequence[str] | None = None
) -> Retention:
    """Compares models after training with the model before it.

    Args:
        before: Scores of the model before training.
        after: Scores after it, by the model's name in the table.
        tasks: Tasks to compare and to average; None: all, of which HumanEval and IFEval are not averaged.

    Raises:
        ResultsError: The scores cannot be compared.
    """
    chosen = list(before.tasks) if tasks is None else list(dict.fromkeys(tasks))
    if not after:
        raise ResultsError("There are no results after the training to compare.")
    for name, results in after.items():
        if tasks is None:
            _check_same_tasks(before, results, name)
        for task in chosen:
            _check_comparable(task, before, results, name)
    averaged = [task for task in chosen if tasks is not None or task not in NOT_AVERAGED]
    if not averaged:
        raise ResultsError(f"Only {', '.join(chosen)} are there, which are not averaged; choose them with --tasks.")
    scores = {task: _estimate(before.tasks[task]) for task in chosen}
    models = [_model(name, scores, results, averaged) for name, results in after.items()]
    titles = {task: before.tasks[task].title for task in chosen}
    return Retention(titles, averaged, scores, mean([scores[task] for task in averaged]), models)


def _model(name: str, before: Mapping[str, Estimate], results: LanguageResults, averaged: Sequence[str]) -> Model:
    scores = {task: _estimate(results.tasks[task]) for task in before}

    def retained(tasks: Sequence[str]) -> Estimate:
        return ratio(mean([scores[task] for task in tasks]), mean([before[task] for task in tasks]))

    without = {task: [other for other in averaged if other != task] for task in averaged if len(averaged) > 1}
    return Model(
        name,
        scores,
        {task: ratio(scores[task], before[task]) for task in before},
        mean([scores[task] for task in averaged]),
        retained(averaged),
        {task: retained(others) for task, others in without.items()},
    )


def _estimate(result: TaskResult) -> Estimate:
    return Estimate(result.score, result.stderr)


def _check_same_tasks(before: LanguageResults, after: LanguageResults, name: str) -> None:
    for where, missing in (
        (name, [task for task in before.tasks if task not in after.tasks]),
        ("the results before", [task for task in after.tasks if task not in before.tasks]),
    ):
        if missing:
            raise ResultsError(
                f"{where} has no score of {', '.join(missing)}: evaluate the same tasks before and after, or choose "
                "those to compare with --tasks."
            )


def _check_comparable(task: str, before: LanguageResults, after: LanguageResults, name: str) -> None:
    """Checks that a task was asked in the same way before and after, and that its ratio means something."""
    for where, results in (("the results before", before), (name, after)):
        if task not in results.tasks:
            raise ResultsError(f"{where} has no score of {task}; it has {', '.join(results.tasks)}.")
    old, new = before.tasks[task], after.tasks[task]
    facts = {
        "metric": (old.metric, new.metric),
        "number of examples (shots)": (old.shots, new.shots),
        "version": (old.version, new.version),
        "number of questions": (old.samples, new.samples),
        "chat template": (old.chat_template, new.chat_template),
    }
    # Conversations differ between the templates of two models; the questions in them are the same.
    if old.prompts is not None and new.prompts is not None and not old.chat_template:
        facts["digest of the prompts"] = (old.prompts, new.prompts)
    for what, (value, other) in facts.items():
        if value != other:
            raise ResultsError(
                f"{task} cannot be compared: its {what} is {value} before and {other} in {name}; evaluate both again "
                "in the same way, or leave the task out with --tasks."
            )
    for where, result in (("before", old), (f"in {name}", new)):
        if not (result.higher_is_better and 0 <= result.score <= 1):
            raise ResultsError(
                f"{task} has no retention: its {result.metric} is {result.score:g} {where}, which is not a share of "
                "right answers; leave the task out with --tasks."
            )
    if old.score == 0:
        raise ResultsError(f"{task} has no retention: its score before is 0; leave the task out with --tasks.")
