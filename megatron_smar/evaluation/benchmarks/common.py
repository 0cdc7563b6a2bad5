# SPDX-License-Identifier: Apache-2.0
"""What the multimodal benchmarks share: reading published files, skipping bad samples, prompts and averages."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, BenchmarkError, Question, Skipped

# LLaVA-1.5's instructions, which follow the question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


class SampleError(ValueError):
    """One sample cannot be asked; the message is `Skipped.reason`."""


def unusable(benchmark: Benchmark, path: Path, wrong: str) -> BenchmarkError:
    """Returns the error for a file of the benchmark: which one, what is wrong with it, and what has to be there."""
    return BenchmarkError(f"{path} {wrong}: {benchmark.title} needs {benchmark.files} (from {benchmark.source})")


def find(benchmark: Benchmark, *names: str) -> Path:
    """Returns the first of the benchmark's paths that exists; they are relative to its folder."""
    for name in names:
        if (benchmark.folder / name).exists():
            return benchmark.folder / name
    raise unusable(benchmark, benchmark.folder / names[0], "does not exist")


def only_split(benchmark: Benchmark, splits: dict[str, tuple[str, ...]]) -> str:
    """Returns the one split of the benchmark whose files and folders are all there."""
    missing = {
        split: [name for name in names if not (benchmark.folder / name).exists()] for split, names in splits.items()
    }
    complete = [split for split, names in missing.items() if not names]
    if len(complete) > 1:
        raise BenchmarkError(
            f"{benchmark.folder} has the files of {' and '.join(complete)}, and one of them is read: "
            f"leave only one of {' and '.join(splits[split][-1] for split in complete)} there"
        )
    if not complete:
        nearest = min(splits, key=lambda split: len(missing[split]) - len(splits[split]))
        raise unusable(benchmark, benchmark.folder / missing[nearest][0], "does not exist")
    return complete[0]


def read_text(benchmark: Benchmark, path: Path) -> str:
    """Returns a file's text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise unusable(benchmark, path, "is not text in UTF-8") from error
    except OSError as error:
        raise _unreadable(benchmark, path, error) from error


def _unreadable(benchmark: Benchmark, path: Path, error: OSError) -> BenchmarkError:
    return unusable(benchmark, path, f"cannot be read ({error.strerror})" if path.exists() else "does not exist")


def read_json(benchmark: Benchmark, path: Path, kind: type = dict) -> Any:
    """Returns the contents of a JSON file, whose outermost value is of the given kind."""
    try:
        value = json.loads(read_text(benchmark, path))
    except json.JSONDecodeError as error:
        raise unusable(benchmark, path, f"is not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(value, kind):
        raise unusable(benchmark, path, f"is of type {type(value).__name__}, not {kind.__name__}")
    return value


def read_json_lines(benchmark: Benchmark, path: Path) -> list[Any]:
    """Returns the contents of a file with one JSON value a line."""
    values = []
    for number, line in enumerate(read_text(benchmark, path).split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise unusable(benchmark, path, f"has no JSON in line {number} ({error.msg})") from error
    return values


def read_table(benchmark: Benchmark, path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Returns the rows of a tab-separated file with a header that has at least these columns."""
    read_limit = csv.field_size_limit(sys.maxsize)  # a picture in base64 is one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise unusable(benchmark, path, f"has no column {', '.join(missing)}")
            return list(reader)
    except OSError as error:
        raise _unreadable(benchmark, path, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise unusable(benchmark, path, f"is not a table in UTF-8 separated by tabs ({error})") from error
    finally:
        csv.field_size_limit(read_limit)


def entries(benchmark: Benchmark, path: Path, contents: dict[str, Any], name: str, kind: type = list) -> Any:
    """Returns the part of a JSON file with the samples."""
    if not isinstance(contents.get(name), kind):
        raise unusable(benchmark, path, f"has no {kind.__name__} '{name}'")
    return contents[name]


def field(record: Any, name: str) -> Any:
    """Returns a sample's field."""
    if not isinstance(record, dict):
        raise SampleError(f"it is of type {type(record).__name__}, not a record")
    if record.get(name) is None:
        raise SampleError(f"it has no '{name}'")
    return record[name]


def text(record: Any, name: str) -> str:
    """Returns a sample's field, which is a string with more than white space."""
    value = field(record, name)
    if not isinstance(value, str):
        raise SampleError(f"its '{name}' is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise SampleError(f"its '{name}' is empty")
    return value


def ten_answers(values: Any) -> tuple[str, ...]:
    """Returns the ten reference answers of the VQA metric, given as strings or as records with 'answer'."""
    if not isinstance(values, list) or len(values) != 10:
        count = len(values) if isinstance(values, list) else "no list of"
        raise SampleError(f"it has {count} reference answers, not 10")
    answers = []
    for value in values:
        answer = value.get("answer") if isinstance(value, dict) else value
        if not isinstance(answer, str):
            raise SampleError(f"a reference answer is of type {type(answer).__name__}, not a string")
        answers.append(answer)
    return tuple(answers)


def identifier(record: Any, name: str, default: str) -> str:
    """Returns the sample's field as the key, or the default where it has none."""
    value = record.get(name) if isinstance(record, dict) else None
    return str(value) if isinstance(value, str | int) else default


class Pictures:
    """Finds pictures by name; each folder is listed once, because val2014 alone holds 40,504."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path, frozenset[str]] = {}

    def __getitem__(self, name: str) -> Path:
        """Returns the picture's path.

        Raises:
            SampleError: It is missing.
        """
        path = self._folder / name
        if path.parent not in self._names:
            listed = path.parent.iterdir() if path.parent.is_dir() else ()
            self._names[path.parent] = frozenset(entry.name for entry in listed)
        if path.name not in self._names[path.parent]:
            raise SampleError(f"its picture {self._folder.name}/{name} is missing")
        return path


def samples(
    benchmark: Benchmark, path: Path, records: Iterable[tuple[str, Any]], make: Callable[[str, Any], Question]
) -> list[Question | Skipped]:
    """Returns a question for each keyed record, or why it is skipped.

    Raises:
        BenchmarkError: Two records have one key, or no sample can be asked.
    """
    found: dict[str, Question | Skipped] = {}
    for key, record in records:
        if key in found:
            raise unusable(benchmark, path, f"has two samples {key}")
        try:
            found[key] = make(key, record)
        except SampleError as error:
            found[key] = Skipped(key, str(error))
    return some(benchmark, path, list(found.values()))


def some(benchmark: Benchmark, path: Path, found: list[Question | Skipped]) -> list[Question | Skipped]:
    """Returns the samples, of which at least one can be asked."""
    if not found:
        raise unusable(benchmark, path, "has no samples")
    first = found[0]
    if isinstance(first, Skipped) and all(isinstance(sample, Skipped) for sample in found):
        raise unusable(benchmark, path, f"has no usable sample ({first.key}: {first.reason})")
    return found


def mean(values: Sequence[float]) -> float:
    """Returns the average, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def averages(name: str, answers: Sequence[Answer], value: Callable[[Answer], float]) -> dict[str, float]:
    """Returns the average of a value in [0, 1] in percent, over all answers and over each group."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        score = 100 * value(answer)
        values.setdefault(name, []).append(score)
        if answer.question.group:
            values.setdefault(f"{name}/{answer.question.group}", []).append(score)
    return {key: mean(scores) for key, scores in values.items()}
