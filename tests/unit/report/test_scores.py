# SPDX-License-Identifier: Apache-2.0
"""The columns of a comparison's scores, and which score is the best of its column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_smar.report.results import read_results
from megatron_smar.report.scores import Column, columns
from tests.unit.report.files import benchmark, task, write_results


def columns_of(folder: Path, **runs: dict[str, Any]) -> list[Column]:
    """Returns the columns of runs whose results are written and read."""
    return columns(
        {name: read_results(write_results(folder / f"{name}.json", **content)) for name, content in runs.items()}
    )


def test_the_highest_score_is_the_best(tmp_path: Path) -> None:
    runs = {name: {"benchmarks": {"mme": benchmark(score)}} for name, score in (("a", 999.0), ("b", 1000.0))}
    (column,) = columns_of(tmp_path, **runs)
    assert column.title == "MME, perception" and column.best == {"b"} and column.cell("b") == "1,000.00"


def test_the_lowest_perplexity_is_the_best(tmp_path: Path) -> None:
    metric = {"metric": "word_perplexity", "stderr": None}
    runs = {name: {"tasks": {"wikitext": task(score, **metric)}} for name, score in (("a", 9.0), ("b", 10.0))}
    (column,) = columns_of(tmp_path, **runs)
    assert column.best == {"a"} and column.cell("a") == "9.000"


def test_scores_that_are_shown_as_equal_are_both_the_best(tmp_path: Path) -> None:
    runs = {name: {"tasks": {"mmlu": task(score)}} for name, score in (("a", 0.50001), ("b", 0.50002), ("c", 0.4))}
    (column,) = columns_of(tmp_path, **runs)
    assert column.best == {"a", "b"} and column.cell("a") == column.cell("b") == "0.500 ± 0.010"


def test_a_single_score_is_not_the_best_of_anything(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"a": {"tasks": {"mmlu": task()}}, "b": {"text_perplexity": 3.0}}
    (column,) = columns_of(tmp_path, **runs)
    assert column.best == set() and column.cell("b") == "-"


def test_scores_on_different_numbers_of_questions_have_no_best(tmp_path: Path) -> None:
    runs = {name: {"benchmarks": {"mme": benchmark(asked=asked)}} for name, asked in (("a", 10), ("b", 2374))}
    (column,) = columns_of(tmp_path, **runs)
    assert not column.is_comparable and column.best == set()


def test_other_prompts_and_versions_are_other_columns(tmp_path: Path) -> None:
    runs = {
        "a": {"tasks": {"mmlu": task(shots=5)}, "benchmarks": {"mme": benchmark(version="one")}},
        "b": {"tasks": {"mmlu": task(shots=0)}, "benchmarks": {"mme": benchmark(version="two")}},
    }
    titles = [column.title for column in columns_of(tmp_path, **runs)]
    assert titles == [
        "MME, perception, version one",
        "mmlu, acc, 5-shot",
        "MME, perception, version two",
        "mmlu, acc, 0-shot",
    ]


def test_prompts_with_and_without_the_chat_template_are_different_columns(tmp_path: Path) -> None:
    runs = {str(chat): {"tasks": {"mmlu": task(chat_template=chat)}} for chat in (False, True)}
    titles = [column.title for column in columns_of(tmp_path, **runs)]
    assert titles == ["mmlu, acc, 5-shot", "mmlu, acc, 5-shot, chat template"]


def test_a_benchmark_without_published_answers_has_no_column(tmp_path: Path) -> None:
    assert columns_of(tmp_path, a={"benchmarks": {"mme": benchmark(metrics={})}}) == []
