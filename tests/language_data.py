# SPDX-License-Identifier: Apache-2.0
"""A folder with invented data sets in the hub's layout, for the language benchmarks that the tests run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = range(6)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def mmlu(folder: Path, subjects: list[str]) -> None:
    """As `cais/mmlu`: parquet files per subject, and a README.md that lists them."""
    place = folder / "cais/mmlu"
    rows = [{"question": f"{n} + 1 = ?", "choices": ["7", "8", "9", str(n + 1)], "answer": 3} for n in NUMBERS]
    header = "---\nconfigs:\n"
    for subject in subjects:
        header += f"- config_name: {subject}\n  data_files:\n"
        for split in ("test", "validation", "dev"):
            parquet(place / subject / f"{split}-00000-of-00001.parquet", [row | {"subject": subject} for row in rows])
            header += f"  - split: {split}\n    path: {subject}/{split}-*\n"
    (place / "README.md").write_text(header + "---\n# MMLU\n")


def ceval(folder: Path, subjects: list[str]) -> None:
    for subject in subjects:
        for split in ("val", "dev"):
            rows = [
                {"id": n, "question": f"{n}加1是", "A": n + 1, "B": 7, "C": 8, "D": 9, "answer": "A"} for n in NUMBERS
            ]
            jsonl(folder / "ceval/ceval-exam" / subject / f"{split}.jsonl", rows)


def bbh(folder: Path, names: list[str]) -> None:
    rows = [{"input": "not True is", "target": "False"}, {"input": "not False is", "target": "True"}]
    for name in names:
        jsonl(folder / "SaylorTwift/bbh" / name / "test.jsonl", rows)


def gsm8k(folder: Path) -> None:
    rows = [{"question": f"What is {n} and 1?", "answer": f"They are {n + 1}.\n#### {n + 1}"} for n in NUMBERS]
    jsonl(folder / "openai/gsm8k/main/test.jsonl", rows)


def arc(folder: Path) -> None:
    choices = {"text": ["a stone", "a tree"], "label": ["A", "B"]}
    rows = [
        {"id": str(n), "question": f"Which one grows? ({n})", "choices": choices, "answerKey": "B"} for n in range(30)
    ]
    for split in ("train", "validation", "test"):
        parquet(folder / f"allenai/ai2_arc/ARC-Challenge/{split}-00000-of-00001.parquet", rows)


def mbpp(folder: Path) -> None:
    test = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]
    code = "def add(a, b):\n    return a + b"
    rows = [{"task_id": n, "text": "Write a function that adds.", "code": code, "test_list": test} for n in range(2)]
    parquet(folder / "google-research-datasets/mbpp/full/test-00000-of-00001.parquet", rows)


def humaneval(folder: Path) -> None:
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    row = {"prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n", "entry_point": "add", "test": test}
    rows = [row | {"task_id": f"HumanEval/{n}"} for n in range(2)]
    parquet(folder / "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet", rows)


def ifeval(folder: Path) -> None:
    """The prompts, whose file is not named after a split, and the data of NLTK's sentence splitter, without a model."""
    kwargs = [{"num_sentences": 2, "relation": "at least"}]
    rows = [
        {"key": n, "prompt": "Write two sentences.", "instruction_id_list": ["length_constraints:number_sentences"]}
        | {"kwargs": kwargs}
        for n in range(2)
    ]
    jsonl(folder / "google/IFEval/ifeval_input_data.jsonl", rows)
    place = folder / "nltk_data/tokenizers/punkt_tab/english"
    place.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (place / name).write_text("")


def hellaswag(folder: Path) -> None:
    """Only the split that is scored, in a file of JSON lines."""
    row = {"activity_label": "Gardening", "ctx_a": "A man digs.", "ctx_b": "he", "label": "1"}
    jsonl(folder / "Rowan/hellaswag/validation.jsonl", [row | {"endings": ["flies away.", "plants a tree."]}] * 3)
