# SPDX-License-Identifier: Apache-2.0
"""ScienceQA-IMG: the multiple-choice questions of ScienceQA's test split that have a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(Benchmark):
    """ScienceQA-IMG, the 2,017 questions of the test split with a picture.

    `problems.json` and `pid_splits.json` (data/scienceqa of the repository), and `images/test/<id>/image.png`.

    The prompt is that of LLaVA's llava_test_CQM-A.json. The metric is accuracy, by subject as well. The chosen letter
    is found as in LLaVA's eval_science_qa.py: the whole prediction is a letter, or begins with a letter, a period and a
    space, or has "The answer is A." with some letter exactly once. Every other prediction, and a letter that is not
    among the choices, is wrong, as there; ScienceQA's own code takes a random choice instead.
    """

    name = "scienceqa"
    title = "ScienceQA-IMG"
    source = "Lu et al., arXiv:2209.09513, https://github.com/lupantech/ScienceQA"
    files = "problems.json, pid_splits.json and images/test/"
    max_new_tokens = 1024
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of the test split that have a picture."""
        self.version = "test, with pictures"
        path = self.folder / "problems.json"
        problems = common.read_json(self, path)
        splits = self.folder / "pid_splits.json"
        keys = common.entries(self, splits, common.read_json(self, splits), "test")
        pictures = common.Pictures(self.folder / "images" / "test")

        def make(key: str, record: Any) -> Question:
            picture = pictures[f"{key}/{common.text(record, 'image')}"]
            choices = common.field(record, "choices")
            letters = _letters(choices, common.field(record, "answer"))
            hint = record.get("hint") or ""
            lines = [f"Context: {hint}"] if hint else []
            lines += [common.text(record, "question")]
            lines += [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
            answer = letters[record["answer"]]
            prompt = "\n".join(lines).strip() + common.LETTER_ANSWER
            details = {"letters": letters}
            return Question(key, prompt, (picture,), (answer,), record.get("subject") or "", details)

        # Problems without a picture have "image": null, and are no part of ScienceQA-IMG.
        keyed = ((str(key), problems.get(str(key), {})) for key in keys)
        shown = (item for item in keyed if not isinstance(item[1], dict) or item[1].get("image", "") is not None)
        return common.samples(self, path, shown, make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns `accuracy` and that of each subject."""
        return common.averages("accuracy", answers, score_answer)


def chosen_letter(prediction: str) -> str:
    """Returns the letter that the prediction chooses, "" for none."""
    prediction = prediction.strip()
    if prediction in tuple(common.LETTERS):
        return prediction
    if prediction[:1] in tuple(common.LETTERS) and prediction[1:3] == ". ":
        return prediction[0]
    named = _SENTENCE.findall(prediction)
    return named[0] if len(named) == 1 else ""


def score_answer(answer: Answer) -> float:
    """Returns whether the chosen letter is the right one."""
    letter = chosen_letter(answer.prediction)
    return float(letter in answer.question.details["letters"] and letter == answer.question.answers[0])


def _letters(choices: Any, answer: Any) -> tuple[str, ...]:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise common.SampleError("its 'choices' are no list of strings")
    if len(choices) > len(common.LETTERS):
        raise common.SampleError(f"it has {len(choices)} choices, more than {len(common.LETTERS)}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise common.SampleError(f"its answer {answer!r} is none of its {len(choices)} choices")
    return tuple(common.LETTERS[: len(choices)])
