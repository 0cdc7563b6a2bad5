# SPDX-License-Identifier: Apache-2.0
"""POPE: whether a model sees objects that are not in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped

CATEGORIES = ("random", "popular", "adversarial")


class POPE(Benchmark):
    """POPE on COCO, whose three categories differ in how the absent objects were drawn.

    `coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json` (output/coco of the repository),
    in the folder or in its `coco/`, each with one JSON record a line, and COCO's `val2014/`.

    The metrics are those of the published evaluate.py for each category, and their averages over the categories.
    LLaVA's table, which the paper's follows, has the average F1. As in evaluate.py a prediction is "no" where its first
    sentence has the word No, no or not, and "yes" in every other case, an empty prediction included. A ratio without
    samples is 0 instead of an error.
    """

    name = "pope"
    title = "POPE"
    source = "Li et al., arXiv:2305.10355, https://github.com/AoiDragon/POPE"
    files = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/"
    max_new_tokens = 128
    main_metric = "f1"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of the three categories."""
        self.version = "coco"
        pictures = common.Pictures(self.folder / "val2014")
        questions: list[Question | Skipped] = []
        for category in CATEGORIES:
            path = common.find(self, f"coco_pope_{category}.json", f"coco/coco_pope_{category}.json")

            def make(key: str, record: Any, category: str = category) -> Question:
                prompt = common.text(record, "text") + common.SHORT_ANSWER
                label = common.text(record, "label")
                if label not in ("yes", "no"):
                    raise common.SampleError(f"its label is {label!r}, neither yes nor no")
                return Question(key, prompt, (pictures[common.text(record, "image")],), (label,), category)

            records = common.read_json_lines(self, path)
            keyed = (
                (f"{category}/{common.identifier(record, 'question_id', f'entry {i}')}", record)
                for i, record in enumerate(records)
            )
            questions += common.samples(self, path, keyed, make)
        return questions

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns accuracy, precision, recall, f1 and yes_ratio: averages over the categories, and of each."""
        by_category = {
            category: confusion([answer for answer in answers if answer.question.group == category])
            for category in CATEGORIES
            if any(answer.question.group == category for answer in answers)
        }
        scores: dict[str, float] = {}
        for metric in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
            if by_category:
                scores[metric] = common.mean([values[metric] for values in by_category.values()])
            scores |= {f"{metric}/{category}": values[metric] for category, values in by_category.items()}
        return scores


def says_yes(prediction: str) -> bool:
    """Returns whether evaluate.py takes the prediction for a yes."""
    words = prediction.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def confusion(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the metrics of one category in percent; "yes" is the positive answer."""
    pairs = [(says_yes(answer.prediction), answer.question.answers[0] == "yes") for answer in answers]
    true_yes = sum(said and label for said, label in pairs)
    precision = _percent(true_yes, sum(said for said, _ in pairs))
    recall = _percent(true_yes, sum(label for _, label in pairs))
    return {
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "accuracy": _percent(sum(said == label for said, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _percent(sum(said for said, _ in pairs), len(pairs)),
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
