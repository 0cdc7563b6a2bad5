# SPDX-License-Identifier: Apache-2.0
"""Which local files a task of the harness reads; none of this needs the harness."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_smar.evaluation.language.local_data import (
    DataError,
    Request,
    go_offline,
    overrides,
    without_missing_splits,
)
from megatron_smar.evaluation.language.task_config import LanguageConfig, TaskError
from megatron_smar.evaluation.language.tasks import load_tasks

TASK = {"task": "quiz", "dataset_path": "org/quiz", "test_split": "test", "fewshot_split": "dev"}


def place(root: Path, *names: str) -> Path:
    for name in names:
        path = root / "org/quiz" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return root / "org/quiz"


def read(root: Path, shots: int = 1, **config: Any) -> dict[str, Any]:
    return overrides(root, Request.of(TASK | config, shots))


@pytest.mark.parametrize(
    "names",
    [
        ("test.jsonl", "dev.jsonl"),
        ("data/test-00000-of-00002.jsonl", "data/test-00001-of-00002.jsonl", "data/dev-00000-of-00001.jsonl"),
        ("test/0000.json", "dev/0000.json"),
        ("test.jsonl", "dev.jsonl", ".cache/huggingface/test.jsonl", "dataset_infos.json"),
    ],
)
def test_files_are_named_after_their_splits_as_on_the_hub(tmp_path, names) -> None:
    root = place(tmp_path, *names)
    local = read(tmp_path)
    expected = {
        split: sorted(str(root / name) for name in names if split in name and not name.startswith((".", "dataset")))
        for split in ("dev", "test")
    }
    assert local == {"dataset_path": "json", "dataset_kwargs": {"data_files": expected}}


def test_a_config_is_a_folder_and_the_format_with_all_splits_is_taken(tmp_path) -> None:
    root = place(tmp_path, "easy/test.parquet", "easy/test.csv", "easy/dev.csv", "hard/test.csv", "hard/dev.csv")
    local = read(tmp_path, dataset_name="easy")
    files = {split: [str(root / f"easy/{split}.csv")] for split in ("dev", "test")}
    assert local == {"dataset_path": "csv", "dataset_kwargs": {"data_files": files}}
    with pytest.raises(DataError, match=r"nor a folder medium, which quiz reads"):
        read(tmp_path, dataset_name="medium")
    with pytest.raises(DataError, match="are in two folders, and quiz names no config"):
        read(tmp_path)


def test_a_file_that_is_named_after_no_split_is_the_training_split(tmp_path) -> None:
    root = place(tmp_path, "input_data.jsonl")
    local = read(tmp_path, shots=0, test_split="train")
    assert local["dataset_kwargs"] == {"data_files": {"train": [str(root / "input_data.jsonl")]}}


def test_the_configs_of_a_readme_are_left_to_the_datasets_library(tmp_path) -> None:
    root = place(tmp_path, "a.parquet")
    (root / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.parquet\n---\n")
    assert read(tmp_path) == {"dataset_path": str(root)}
    (root / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(DataError, match=r"The header of .*README.md is not YAML"):
        read(tmp_path)


def test_the_split_of_the_examples_is_needed_only_for_examples(tmp_path) -> None:
    place(tmp_path, "test.jsonl")
    with pytest.raises(DataError, match=r"no file of the split dev, which quiz reads; .*\(found: test\)"):
        read(tmp_path)
    files = read(tmp_path, shots=0)["dataset_kwargs"]["data_files"]
    assert without_missing_splits(TASK, files) == {"fewshot_split": None}


def test_examples_that_the_task_itself_holds_need_no_split() -> None:
    config = TASK | {"fewshot_split": None, "training_split": "train", "fewshot_config": {"samples": [{}]}}
    assert Request.of(config, 3).splits == ("test",)
    assert Request.of(config | {"fewshot_config": None}, 3).splits == ("test", "train")


def test_the_hugging_face_libraries_are_offline_also_when_imported_before(monkeypatch) -> None:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    for name in names:
        monkeypatch.setenv(name, "0")
    module = ModuleType("datasets.config")
    module.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets.config", module)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    go_offline()
    assert [os.environ[name] for name in names] == ["1"] * 3
    assert constants.HF_HUB_OFFLINE and module.HF_HUB_OFFLINE  # type: ignore[attr-defined]


def test_a_missing_harness_is_reported_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r'pip install "megatron_smar\[eval\]"'):
        load_tasks(LanguageConfig(("mmlu",)))
