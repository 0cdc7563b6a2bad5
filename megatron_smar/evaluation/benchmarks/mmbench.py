# SPDX-License-Identifier: Apache-2.0
"""MMBench: multiple-choice questions that count only if they are answered right in every rotation of the options."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_smar.evaluation.benchmarks import common
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, Question, Skipped

OPTIONS = "ABCD"
ROTATION = 1_000_000  # rotation k of question i has the index k * ROTATION + i

_FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv")
_COLUMNS = ("index", "question", "hint", *OPTIONS, "image")
# What pandas and LLaVA read as an empty cell.
_EMPTY = frozenset({"", "nan", "-nan", "none", "null", "na", "n/a", "#n/a", "<na>"})
_REFERENCE = 64  # an image cell of at most so many characters names the row that has the picture
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


class MMBench(Benchmark):
    """MMBench in English, dev or test.

    `mmbench_dev_20230712.tsv`, which LLaVA reads and https://download.openmmlab.com/mmclassification/datasets/mmbench/
    has, or the later `MMBench_DEV_EN.tsv` of VLMEvalKit; `mmbench_test_20230712.tsv` or `MMBench_TEST_EN.tsv` for test.
    The rotations are rows of these files. A question of the dev file may lack one, and is then judged by the others.

    The metric is circular accuracy, by category as well: a question is right only if it is in all of its rotations.
    `plain_accuracy` counts only the first one. If a row cannot be asked, all rotations of its question are skipped.
    The chosen option is found as in VLMEvalKit without a judge ("exact matching"): where its rules find none, MMBench's
    server asks ChatGPT, and here the prediction is wrong. The answers to the test split are not published.

    `submission` writes a tab-separated file with the server's columns; the server takes it saved as .xlsx.
    """

    name = "mmbench"
    title = "MMBench"
    source = "Liu et al., arXiv:2307.06281, https://github.com/open-compass/MMBench"
    files = f"{', '.join(_FILES[:-1])} or {_FILES[-1]}"
    max_new_tokens = 1024
    main_metric = "accuracy"

    def read(self) -> list[Question | Skipped]:
        """Reads all rotations of the questions of the split that is there."""
        path = common.find(self, *_FILES)
        others = [name for name in _FILES if (self.folder / name).exists() and name != path.name]
        if others:
            raise common.unusable(self, path, f"is not the only table, {others[0]} is there too")
        self.version = path.stem
        dev = "dev" in path.name.lower()
        rows = common.read_table(self, path, (*_COLUMNS, "answer") if dev else _COLUMNS)
        if not any(row["index"] and row["index"].isdigit() and int(row["index"]) >= ROTATION for row in rows):
            raise common.unusable(self, path, f"has no rotations of the options (rows with index {ROTATION} and more)")
        images = {row["index"]: row["image"] or "" for row in rows}

        def make(key: str, row: dict[str, str]) -> Question:
            return _question(key, row, _image(key, images), dev)

        keyed = ((row["index"] or f"row {number}", row) for number, row in enumerate(rows, start=1))
        return _skip_whole(common.samples(self, path, keyed, make))

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns accuracy, by category as well, and plain_accuracy; nothing for the test split."""
        rotations: dict[int, list[Answer]] = defaultdict(list)
        for answer in answers:
            if answer.question.answers:
                rotations[int(answer.question.key) % ROTATION].append(answer)
        firsts = [min(group, key=lambda answer: int(answer.question.key)) for group in rotations.values()]
        circular = {
            first.question.key: float(all(is_right(answer) for answer in group))
            for first, group in zip(firsts, rotations.values(), strict=True)
        }
        scores = common.averages("accuracy", firsts, lambda answer: circular[answer.question.key])
        plain = common.averages("plain_accuracy", firsts, lambda answer: float(is_right(answer)))
        return scores | {name: value for name, value in plain.items() if "/" not in name}

    def unit(self, key: str) -> str:
        """Returns the question: its rotations are scored together."""
        return str(int(key) % ROTATION) if key.isdigit() else key

    def submission(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Returns the table for the server."""
        if not answers:
            return {}
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", *OPTIONS, "prediction", "answer"])
        for answer in answers:
            options = answer.question.details["options"]
            cells = [options.get(letter, "") for letter in OPTIONS]
            key, question = answer.question.key, answer.question.details["question"]
            writer.writerow([key, question, *cells, answer.prediction.strip(), *(answer.question.answers or ("",))])
        return {f"{self.name}_predictions.tsv": file.getvalue()}


def chosen_option(prediction: str, options: Mapping[str, str]) -> str:
    """Returns the letter of the option that the prediction chooses, "" for none.

    It is the one letter among the last four words, or that of "answer is A", or of the one option whose text is in it.
    """
    if any(refusal in prediction for refusal in _REFUSALS):
        return ""
    words = prediction.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:  # VLMEvalKit's letter for "none of them"
        return ""
    named = _SENTENCE.search(prediction)
    if named and named[1].upper() in options:
        return named[1].upper()
    if len(prediction) > 2 * sum(map(len, options.values())):
        return ""
    contained = [letter for letter, option in options.items() if option.lower() in prediction.lower()]
    return contained[0] if len(contained) == 1 else ""


def is_right(answer: Answer) -> bool:
    """Returns whether one rotation is answered right."""
    return chosen_option(answer.prediction, answer.question.details["options"]) == answer.question.answers[0]


def _question(key: str, row: dict[str, str], image: bytes, dev: bool) -> Question:
    if not key.isdigit():
        raise common.SampleError(f"its index {key!r} is not a number")
    options: dict[str, str] = {}
    for letter in OPTIONS:
        if _empty(row[letter]):
            break  # as in LLaVA, options end at the first empty one
        options[letter] = row[letter]
    if len(options) < 2:
        raise common.SampleError(f"it has {len(options)} options")
    if dev and row["answer"] not in options:
        raise common.SampleError(f"its answer {row['answer']!r} is none of its options")
    question = common.text(row, "question")
    lines = [] if _empty(row["hint"]) else [row["hint"]]
    lines += [question, *(f"{letter}. {option}" for letter, option in options.items())]
    group = "" if _empty(row.get("category")) else row["category"]
    details = {"options": options, "question": question}
    prompt = "\n".join(lines) + common.LETTER_ANSWER
    return Question(key, prompt, (image,), (row["answer"],) if dev else (), group, details)


def _image(key: str, images: Mapping[str, str]) -> bytes:
    cell = images.get(key, "")
    if 0 < len(cell) <= _REFERENCE and cell in images:
        cell = images[cell]
    try:
        image = base64.b64decode(cell, validate=True)
    except binascii.Error:
        image = b""
    if not image:
        raise common.SampleError("its picture is missing or not in base64")
    return image


def _empty(cell: str | None) -> bool:
    return cell is None or cell.strip().lower() in _EMPTY


def _skip_whole(samples: list[Question | Skipped]) -> list[Question | Skipped]:
    """Skips a question's other rotations where one is skipped: without it the question would be easier."""
    bad = {int(item.key) % ROTATION: item for item in samples if isinstance(item, Skipped) and item.key.isdigit()}

    def judged(item: Question | Skipped) -> Question | Skipped:
        cause = bad.get(int(item.key) % ROTATION) if isinstance(item, Question) else None
        return Skipped(item.key, f"its rotation {cause.key} is skipped ({cause.reason})") if cause else item

    return [judged(item) for item in samples]
