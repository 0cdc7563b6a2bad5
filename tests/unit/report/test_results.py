# SPDX-License-Identifier: Apache-2.0
"""Results files of tools/evaluate.py: what is read from them, and which are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_smar.report.results import HELD_OUT, read_results
from tests.unit.report.files import benchmark, routing, task, write_results


def test_layers_are_in_the_order_of_their_numbers_and_not_of_their_text(tmp_path: Path) -> None:
    by_layer = {"10": 1.0, "2": 0.2, "1": 0.1}
    path = write_results(
        tmp_path / "results.json", benchmarks={"mme": benchmark(routing={"mrd_distance_by_layer": by_layer})}
    )
    distances = read_results(path).benchmarks["mme"].routing.distances
    assert list(distances.items()) == [(1, 0.1), (2, 0.2), (10, 1.0)]


def test_lists_of_the_held_out_questions_begin_at_layer_1(tmp_path: Path) -> None:
    shares = {"text": [[0.25, 0.75], [0.5, 0.5]]}
    results = read_results(
        write_results(tmp_path / "results.json", mrd_distance_by_layer=[0.5, 1.5], expert_share=shares)
    )
    assert results.held_out.distances == {1: 0.5, 2: 1.5}
    assert results.held_out.size == (2, 2) and list(results.routings) == [HELD_OUT]


def test_a_benchmark_keeps_its_metrics_and_the_reasons_of_skipped_samples(tmp_path: Path) -> None:
    entry = read_results(write_results(tmp_path / "results.json", benchmarks={"mme": benchmark()})).benchmarks["mme"]
    assert entry.metrics == {"perception": 1234.5, "points/OCR": 77.25}
    assert entry.skipped == {"its picture is missing": 2} and entry.asked == 10


def test_tasks_are_read_from_the_results_of_the_harness_too(tmp_path: Path) -> None:
    results = read_results(write_results(tmp_path / "r.json", language={"harness": "0.4", "tasks": {"mmlu": task()}}))
    assert results.tasks["mmlu"].score == 0.5


def test_a_model_without_moe_layers_has_scores_and_no_routing(tmp_path: Path) -> None:
    dense = {"samples": 9, "mrd_distance_by_layer": {}, "expert_share": {"text": {}, "vision": {}}}
    results = read_results(write_results(tmp_path / "r.json", benchmarks={"mme": benchmark(routing=dense)}))
    assert results.benchmarks["mme"].metrics and not results.routings


def test_null_stands_for_a_distance_that_could_not_be_measured(tmp_path: Path) -> None:
    results = read_results(write_results(tmp_path / "results.json", mrd_distance_by_layer=[None, 1.0]))
    assert math.isnan(results.held_out.distances[1])


@pytest.mark.parametrize(
    ("metric", "more", "lower"),
    [
        ("acc", {}, False),
        ("word_perplexity,none", {}, True),
        ("acc,none", {"higher_is_better": False}, True),
        ("perplexity", {"higher_is_better": True}, False),
    ],
)
def test_a_perplexity_is_better_if_lower_unless_the_file_says_otherwise(
    metric: str, more: dict[str, bool], lower: bool, tmp_path: Path
) -> None:
    entry = read_results(write_results(tmp_path / "r.json", tasks={"t": task(metric=metric, **more)})).tasks["t"]
    assert entry.lower_is_better is lower and not entry.metric.endswith(",none")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"history": {}}, "r.json has no results of evaluate.py: it has none of the keys"),
        ({"benchmarks": {"mme": {"title": "MME"}}}, "benchmarks.mme is not in the form .*main_metric' is missing"),
        ({"benchmarks": [1]}, "benchmarks is not in the form"),
        ({"tasks": {"mmlu": task() | {"score": "high"}}}, "tasks.mmlu is not in the form"),
        ({"expert_share": {"text": [[0.5, 0.5], [1.0]]}}, "expert_share of text is not a table of layers and experts"),
        (
            {"expert_share": {"text": [[0.5, 0.5]], "vision": [[1.0]]}},
            "the modalities in expert_share have different numbers of layers or experts",
        ),
        (
            {"benchmarks": {"mme": benchmark(routing=routing() | {"mrd_distance_by_layer": {"first": 1.0}})}},
            "benchmarks.mme is not in the form .*'first'",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_sentence(
    content: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_results(write_results(tmp_path / "r.json", **content))


@pytest.mark.parametrize(("text", "sentence"), [("{", "cannot be read"), ("[1]", "is not an object")])
def test_a_file_that_is_not_an_object_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = write_results(tmp_path / "r.json")
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_results(path)
