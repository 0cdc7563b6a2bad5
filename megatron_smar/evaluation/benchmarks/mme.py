# SPDX-License-Identifier: Apache-2.0
"""MME: two yes-or-no questions for each picture, in fourteen subtasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, BenchmarkError, Question, Skipped

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_REQUEST = "Please answer yes or no."
_SUFFIXES = (".jpg", ".png", ".jpeg")


class MME(Benchmark):
    """MME, all fourteen subtasks.

    MME_Benchmark_release_version.zip: a folder for each subtask, in the folder or in its
    `MME_Benchmark_release_version/`, with or without `MME_Benchmark/` in between. Each picture has a text file of its
    name with two lines, "question<tab>Yes" and "question<tab>No". Both are in the subtask's folder, or in its `images/`
    and `questions_answers_YN/`.

    In the prompt, LLaVA's instruction takes the place of "Please answer yes or no.". The metrics are those of the
    published calculation.py: a subtask's points are its accuracy plus its accuracy+, the share of pictures with both
    questions right, in percent. `perception`, which the paper reports, and `cognition` are sums over their subtasks, at
    most 2000 and 800. As in calculation.py a prediction is yes or no where its first four characters contain that
    word, and otherwise wrong. A picture is scored when both of its questions were answered.
    """

    name = "mme"
    title = "MME"
    source = "Fu et al., arXiv:2306.13394, https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
    files = "the folders of the fourteen subtasks, existence/ to code_reasoning/, of MME_Benchmark_release_version.zip"
    max_new_tokens = 128
    main_metric = "perception"

    def read(self) -> list[Question | Skipped]:
        """Reads the questions of all subtasks."""
        self.version = "MME_Benchmark_release_version"
        root = self._root()
        questions: list[Question | Skipped] = []
        for subtask in PERCEPTION + COGNITION:
            folder = root / subtask
            if not folder.is_dir():
                raise common.unusable(self, folder, "does not exist")
            parts = (folder / "images", folder / "questions_answers_YN")
            shown, texts = parts if parts[1].is_dir() else (folder, folder)
            pictures = common.Pictures(shown)
            samples: list[Question | Skipped] = []
            for path in sorted(texts.glob("*.txt")):
                samples += self._pair(subtask, path, pictures)
            questions += common.some(self, texts, samples)
        return questions

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns perception, cognition, and points, accuracy and accuracy_plus of each subtask."""
        pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for answer in answers:
            right = said(answer.prediction) == answer.question.answers[0]
            pictures[answer.question.group][answer.question.details["picture"]].append(right)
        sums = {"perception": 0.0, "cognition": 0.0}
        scores: dict[str, float] = {}
        for subtask in PERCEPTION + COGNITION:
            pairs = [pair for pair in pictures[subtask].values() if len(pair) == 2]
            if pairs:
                accuracy = 100 * common.mean([sum(pair) / 2 for pair in pairs])
                plus = 100 * common.mean([float(all(pair)) for pair in pairs])
                scores |= {f"points/{subtask}": accuracy + plus}
                scores |= {f"accuracy/{subtask}": accuracy, f"accuracy_plus/{subtask}": plus}
                sums["perception" if subtask in PERCEPTION else "cognition"] += accuracy + plus
        return sums | scores if scores else {}

    def unit(self, key: str) -> str:
        """Returns the picture: its two questions are scored together."""
        return key.rpartition("/")[0]

    def _root(self) -> Path:
        release = self.folder / "MME_Benchmark_release_version"
        places = (self.folder, self.folder / "MME_Benchmark", release, release / "MME_Benchmark")
        return next((place for place in places if (place / PERCEPTION[0]).is_dir()), self.folder)

    def _pair(self, subtask: str, path: Path, pictures: common.Pictures) -> list[Question | Skipped]:
        """Returns a picture's two questions, or why both are skipped: accuracy+ needs both."""
        keys = [f"{subtask}/{path.stem}/{number}" for number in (1, 2)]
        try:
            picture = _picture(pictures, path.stem)
            pairs = _questions(self, path)
        except common.SampleError as error:
            return [Skipped(key, str(error)) for key in keys]
        details = {"picture": path.stem}
        return [
            Question(key, prompt, (picture,), (label,), subtask, details)
            for key, (prompt, label) in zip(keys, pairs, strict=True)
        ]


def said(prediction: str) -> str:
    """Returns whether calculation.py takes the prediction for "yes", "no" or "other"."""
    start = prediction.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _picture(pictures: common.Pictures, stem: str) -> Path:
    for suffix in _SUFFIXES:
        try:
            return pictures[stem + suffix]
        except common.SampleError:
            continue
    raise common.SampleError(f"it has no picture {stem}.jpg or {stem}.png")


def _questions(benchmark: Benchmark, path: Path) -> list[tuple[str, str]]:
    """Returns the prompts and labels of a text file."""
    try:
        lines = [line for line in common.read_text(benchmark, path).split("\n") if line.strip()]
    except BenchmarkError as error:  # one picture's file, not the benchmark's
        raise common.SampleError(f"{path.name} cannot be read as text in UTF-8") from error
    if len(lines) != 2:
        raise common.SampleError(f"{path.name} has {len(lines)} questions, not 2")
    pairs = []
    for line in lines:
        question, _, label = line.strip().rpartition("\t")
        if not question or label.lower() not in ("yes", "no"):
            raise common.SampleError(f"{path.name} has a line that is not a question, a tab, and Yes or No")
        pairs.append((question.replace(_REQUEST, "").strip() + common.SHORT_ANSWER, label.lower()))
    return pairs
