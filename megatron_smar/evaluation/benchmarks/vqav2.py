# SPDX-License-Identifier: Apache-2.0
"""VQAv2: open questions about COCO pictures, answered by ten people each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped
from megatron_smar.evaluation.benchmarks.vqa_accuracy import normalize_fully, vqa_accuracy

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
_PICTURES = {"val2014": "val2014", "test-dev2015": "test2015"}


class VQAv2(Benchmark):
    """VQAv2, validation or test-dev.

    Validation: `v2_OpenEnded_mscoco_val2014_questions.json` (v2_Questions_Val_mscoco.zip),
    `v2_mscoco_val2014_annotations.json` (v2_Annotations_Val_mscoco.zip) and `val2014/COCO_val2014_%012d.jpg`.

    Test-dev, which LLaVA's table has: `v2_OpenEnded_mscoco_test-dev2015_questions.json` (v2_Questions_Test_mscoco.zip)
    and `test2015/`. Its answers are not published: `submission` writes what the server takes,
    https://eval.ai/web/challenges/challenge-page/830. It wants all questions of
    `v2_OpenEnded_mscoco_test2015_questions.json` (same zip) and, as in LLaVA, gets "" for those not asked.

    The metric is VQA accuracy, by answer type as well. Predictions are first normalized as LLaVA's submission is.
    """

    name = "vqav2"
    title = "VQAv2"
    source = "Goyal et al., arXiv:1612.00837, https://visualqa.org/download.html"
    files = (
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/, "
        "or v2_OpenEnded_mscoco_test-dev2015_questions.json and test2015/"
    )
    max_new_tokens = 128
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of the split whose files are there."""
        self.version = split = common.only_split(
            self,
            {
                "val2014": (_QUESTIONS.format("val2014"), _ANNOTATIONS.format("val2014"), "val2014"),
                "test-dev2015": (_QUESTIONS.format("test-dev2015"), "test2015"),
            },
        )
        path, questions = self._entries(_QUESTIONS.format(split), split, "questions")
        annotations = self._annotations(split) if split == "val2014" else None
        pictures = common.Pictures(self.folder / _PICTURES[split])

        def make(key: str, record: Any) -> Question:
            image = common.field(record, "image_id")
            if not isinstance(image, int):
                raise common.SampleError(f"its 'image_id' is {image!r}, not a number")
            prompt = common.text(record, "question") + common.SHORT_ANSWER
            picture = pictures[f"COCO_{_PICTURES[split]}_{image:012d}.jpg"]
            if annotations is None:
                return Question(key, prompt, (picture,))
            if key not in annotations:
                raise common.SampleError("it has no annotation")
            answers = common.ten_answers(common.field(annotations[key], "answers"))
            return Question(key, prompt, (picture,), answers, common.text(annotations[key], "answer_type"))

        keyed = ((common.identifier(record, "question_id", f"entry {i}"), record) for i, record in enumerate(questions))
        return common.samples(self, path, keyed, make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns `accuracy` and `accuracy/` yes/no, number and other; nothing for test-dev."""
        scored = [answer for answer in answers if answer.question.answers]
        return common.averages("accuracy", scored, score_answer)

    def submission(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Returns the file for the server, for test-dev."""
        if any(answer.question.answers for answer in answers) or not answers:
            return {}
        replies = {answer.question.key: normalize_fully(answer.prediction) for answer in answers}
        keys = dict.fromkeys(replies, "")
        if (self.folder / _QUESTIONS.format("test2015")).exists():
            _, questions = self._entries(_QUESTIONS.format("test2015"), "test2015", "questions")
            keys |= {common.identifier(record, "question_id", ""): "" for record in questions}
        results = [{"question_id": int(key), "answer": answer} for key, answer in (keys | replies).items() if key]
        return {"vqa_OpenEnded_mscoco_test2015_results.json": json.dumps(results)}

    def _entries(self, name: str, split: str, part: str) -> tuple[Path, list[Any]]:
        path = self.folder / name
        contents = common.read_json(self, path)
        # The test questions of either kind come with the pictures of test2015.
        if contents.get("data_subtype") not in (split, _PICTURES.get(split, split)):
            raise common.unusable(self, path, f"is for {contents.get('data_subtype')!r}, not for {split!r}")
        info = contents.get("info")
        version = str(info.get("version", "2.0")) if isinstance(info, dict) else "2.0"
        if not version.startswith("2"):
            raise common.unusable(self, path, f"is of version {version}, not 2.0")
        return path, common.entries(self, path, contents, part)

    def _annotations(self, split: str) -> dict[str, Any]:
        _, records = self._entries(_ANNOTATIONS.format(split), split, "annotations")
        return {common.identifier(record, "question_id", ""): record for record in records}


def score_answer(answer: Answer) -> float:
    """Returns the VQA accuracy of an answer that is normalized as for the server."""
    return vqa_accuracy(normalize_fully(answer.prediction), answer.question.answers)
