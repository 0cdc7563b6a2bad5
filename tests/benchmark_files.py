# SPDX-License-Identifier: Apache-2.0
"""Small files in the layouts in which the multimodal benchmarks are published, and ways to read and answer them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, BenchmarkError, Question, Skipped


def write_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def questions(benchmark: Benchmark) -> dict[str, Question]:
    return {sample.key: sample for sample in benchmark.read() if isinstance(sample, Question)}


def skipped(benchmark: Benchmark) -> dict[str, str]:
    return {sample.key: sample.reason for sample in benchmark.read() if isinstance(sample, Skipped)}


def answers(benchmark: Benchmark, predictions: Mapping[str, str]) -> list[Answer]:
    """Answers the questions of these keys."""
    asked = questions(benchmark)
    return [Answer(asked[key], prediction) for key, prediction in predictions.items()]


def refusal(benchmark: Benchmark) -> str:
    """Returns the one sentence with which the benchmark refuses its files."""
    with pytest.raises(BenchmarkError) as error:
        benchmark.read()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert benchmark.files in sentence and benchmark.source in sentence  # how to fix it
    return sentence
