# SPDX-License-Identifier: Apache-2.0
"""VizWiz-VQA: pictures and spoken questions of blind people, some of which cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped
from megatron_smar.evaluation.benchmarks.vqa_accuracy import leave_one_out, normalize_fully

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """VizWiz-VQA, validation or test.

    `val.json` or `test.json` (Annotations.zip), in the folder or in its `Annotations/`, and the pictures in `val/` or
    `test/`. The split is the one whose pictures are there. LLaVA's table has the test split, whose answers are not
    published: `submission` writes what https://eval.ai/web/challenges/challenge-page/2185 takes.

    The metric is VQA accuracy as VizWiz's own code computes it, by answer type as well: unlike VQA's, it normalizes the
    prediction only, and compares it with the references as published. Predictions are first normalized as LLaVA's
    submission is.
    """

    name = "vizwiz"
    title = "VizWiz"
    source = "Gurari et al., arXiv:1802.08218, https://vizwiz.org/tasks-and-datasets/vqa"
    files = "val.json and val/, or test.json and test/"
    max_new_tokens = 128
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of the split whose pictures are there."""
        self.version = split = common.only_split(self, {"val": ("val",), "test": ("test",)})
        path = common.find(self, f"{split}.json", f"Annotations/{split}.json")
        pictures = common.Pictures(self.folder / split)

        def make(key: str, record: Any) -> Question:
            # LLaVA's questions are in lower case but for the first letter.
            prompt = common.text(record, "question").capitalize() + _UNANSWERABLE + common.SHORT_ANSWER
            picture = pictures[common.text(record, "image")]
            if split == "test":
                return Question(key, prompt, (picture,))
            answers = common.ten_answers(common.field(record, "answers"))
            return Question(key, prompt, (picture,), answers, common.text(record, "answer_type"))

        records = common.read_json(self, path, list)
        keyed = ((common.identifier(record, "image", f"entry {i}"), record) for i, record in enumerate(records))
        return common.samples(self, path, keyed, make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns `accuracy` and that of each answer type; nothing for the test split."""
        scored = [answer for answer in answers if answer.question.answers]
        return common.averages("accuracy", scored, score_answer)

    def submission(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Returns the file for the server, for the test split."""
        if any(answer.question.answers for answer in answers) or not answers:
            return {}
        results = [{"image": item.question.key, "answer": normalize_fully(item.prediction)} for item in answers]
        return {"vizwiz_test_results.json": json.dumps(results)}


def score_answer(answer: Answer) -> float:
    """Returns the VQA accuracy of an answer."""
    return leave_one_out(normalize_fully(answer.prediction), answer.question.answers)
