# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: open questions that need several capabilities, whose free answers GPT-4 grades."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped


class MMVet(Benchmark):
    """MM-Vet, version 1.

    `mm-vet.json` and `images/` of mm-vet.zip. The prompt is the question alone, as in LLaVA.

    There is no metric without the judge: `score` returns nothing, and `submission` writes the file that its
    mm-vet_evaluator.py reads as results/<model>.json and https://huggingface.co/spaces/whyu/MM-Vet_Evaluator takes. The
    judge stops at an id that is not in the file, so skipped samples have to be repaired first. The number that papers
    report is the judge's "total".
    """

    name = "mmvet"
    title = "MM-Vet"
    source = "Yu et al., arXiv:2308.02490, https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
    files = "mm-vet.json and images/"
    max_new_tokens = 1024
    main_metric = "total"

    def read(self) -> list[Question | Skipped]:
        """Reads all questions."""
        self.version = "v1"
        path = self.folder / "mm-vet.json"
        records = common.read_json(self, path)
        if not any(key.startswith("v1_") for key in records):
            raise common.unusable(self, path, "has no ids v1_0, v1_1 and so on of version 1")
        pictures = common.Pictures(self.folder / "images")

        def make(key: str, record: Any) -> Question:
            picture = pictures[common.text(record, "imagename")]
            return Question(key, common.text(record, "question"), (picture,), (common.text(record, "answer"),))

        return common.samples(self, path, records.items(), make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns nothing: the answers are graded by the judge."""
        return {}

    def submission(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Returns the file for the judge: each prediction by its question's id."""
        if not answers:
            return {}
        replies = {answer.question.key: answer.prediction.strip() for answer in answers}
        return {"mm-vet_results.json": json.dumps(replies, indent=2)}
