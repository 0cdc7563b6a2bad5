# SPDX-License-Identifier: Apache-2.0
"""GQA: compositional questions about scenes, with one-word answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped


class GQA(Benchmark):
    """GQA, the balanced questions of test-dev.

    `testdev_balanced_questions.json` (questions1.2.zip) and `images/` (images.zip).

    The metric is that of the published eval.py: the share of predictions equal to the answer, also for "binary" and
    "open" questions apart. LLaVA first removes periods at the prediction's end and capitals, and so does this.
    """

    name = "gqa"
    title = "GQA"
    source = "Hudson and Manning, arXiv:1902.09506, https://cs.stanford.edu/people/dorarad/gqa/download.html"
    files = "testdev_balanced_questions.json of questions1.2.zip, and images/"
    max_new_tokens = 128
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of test-dev."""
        self.version = "testdev_balanced"
        path = self.folder / "testdev_balanced_questions.json"
        records = common.read_json(self, path)
        pictures = common.Pictures(self.folder / "images")

        def make(key: str, record: Any) -> Question:
            prompt = common.text(record, "question") + common.SHORT_ANSWER
            picture = pictures[common.text(record, "imageId") + ".jpg"]
            kind = common.text(common.field(record, "types"), "structural")
            # As in eval.py: a question is open where the answer is queried rather than chosen or confirmed.
            group = "open" if kind == "query" else "binary"
            return Question(key, prompt, (picture,), (common.text(record, "answer"),), group)

        return common.samples(self, path, records.items(), make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns `accuracy`, `accuracy/binary` and `accuracy/open`."""
        return common.averages("accuracy", answers, score_answer)


def score_answer(answer: Answer) -> float:
    """Returns whether the prediction is the answer, up to capitals and periods at its end."""
    return float(answer.prediction.strip().rstrip(".").lower() == answer.question.answers[0])
