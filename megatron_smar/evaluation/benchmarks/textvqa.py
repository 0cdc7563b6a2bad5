# SPDX-License-Identifier: Apache-2.0
"""TextVQA: questions whose answers are written in the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped
from megatron_smar.evaluation.benchmarks.vqa_accuracy import leave_one_out, normalize_fully

_PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"
_TOKENS = "TextVQA_Rosetta_OCR_v0.2_val.json"


class TextVQA(Benchmark):
    """TextVQA 0.5.1, validation.

    `TextVQA_0.5.1_val.json` and `train_images/` (train_val_images.zip). Recognized text goes into the prompt as in
    LLaVA, "Reference OCR token: A, B", where the folder has one of these files, and does not otherwise:

    - `llava_textvqa_val_v051_ocr.jsonl` of LLaVA's eval.zip, whose prompts are taken as they are, or
    - `TextVQA_Rosetta_OCR_v0.2_val.json`, next to the questions on https://textvqa.org/dataset.

    `version` says which of the three it was. The paper's table follows LLaVA, so it has the first.

    The metric is VQA accuracy as MMF and LLaVA compute it: predictions and answers both fully normalized.
    """

    name = "textvqa"
    title = "TextVQA"
    source = "Singh et al., arXiv:1904.08920, https://textvqa.org/dataset"
    files = f"TextVQA_0.5.1_val.json and train_images/, and {_PROMPTS} or {_TOKENS} for prompts with recognized text"
    max_new_tokens = 128
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of the validation split."""
        path = self.folder / "TextVQA_0.5.1_val.json"
        contents = common.read_json(self, path)
        for name, expected in (("dataset_version", "0.5.1"), ("dataset_type", "val")):
            if contents.get(name) != expected:
                raise common.unusable(self, path, f"has {name} {contents.get(name)!r}, not {expected!r}")
        prompt_of = self._prompts()
        pictures = common.Pictures(self.folder / "train_images")

        def make(key: str, record: Any) -> Question:
            image = common.text(record, "image_id")
            prompt = prompt_of(image, common.text(record, "question"))
            answers = common.ten_answers(common.field(record, "answers"))
            return Question(key, prompt, (pictures[f"{image}.jpg"],), answers)

        records = common.entries(self, path, contents, "data")
        keyed = ((common.identifier(record, "question_id", f"entry {i}"), record) for i, record in enumerate(records))
        return common.samples(self, path, keyed, make)

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns `accuracy`."""
        return common.averages("accuracy", answers, score_answer)

    def _prompts(self) -> Callable[[str, str], str]:
        if (self.folder / _PROMPTS).exists():
            self.version = "val 0.5.1, LLaVA's prompts with recognized text"
            return self._llava_prompts()
        if (self.folder / _TOKENS).exists():
            self.version = "val 0.5.1, prompts with Rosetta's recognized text"
            return self._rosetta_prompts()
        self.version = "val 0.5.1, prompts without recognized text"
        return lambda image, question: question.capitalize() + common.SHORT_ANSWER

    def _llava_prompts(self) -> Callable[[str, str], str]:
        path = self.folder / _PROMPTS
        prompts = {}
        for record in common.read_json_lines(self, path):
            try:
                prompt = common.text(record, "text")
                prompts[common.text(record, "question_id"), prompt.split("\n")[0].lower()] = prompt
            except common.SampleError as error:
                raise common.unusable(self, path, f"has a line that is no prompt of LLaVA's ({error})") from error

        def prompt_of(image: str, question: str) -> str:
            # Paired as in LLaVA's eval_textvqa.py: its file has the picture's id, not the question's.
            if (image, question.lower()) not in prompts:
                raise common.SampleError(f"it has no prompt in {_PROMPTS}")
            return prompts[image, question.lower()]

        return prompt_of

    def _rosetta_prompts(self) -> Callable[[str, str], str]:
        path = self.folder / _TOKENS
        records = common.entries(self, path, common.read_json(self, path), "data")
        tokens = {common.identifier(record, "image_id", ""): record for record in records}

        def prompt_of(image: str, question: str) -> str:
            if image not in tokens:
                raise common.SampleError(f"its picture {image} is not in {_TOKENS}")
            words = common.field(tokens[image], "ocr_tokens")
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise common.SampleError(f"its 'ocr_tokens' in {_TOKENS} are no list of strings")
            return f"{question.capitalize()}\nReference OCR token: {', '.join(words)}{common.SHORT_ANSWER}"

        return prompt_of


def score_answer(answer: Answer) -> float:
    """Returns the VQA accuracy of an answer."""
    return leave_one_out(
        normalize_fully(answer.prediction), [normalize_fully(text) for text in answer.question.answers]
    )
