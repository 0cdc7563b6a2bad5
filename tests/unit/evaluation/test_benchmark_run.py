# SPDX-License-Identifier: Apache-2.0
"""Which questions a limit keeps, and the file from which an interrupted evaluation resumes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.evaluation.benchmarks.base import Benchmark, BenchmarkError, Question, Skipped


class Pairs(Benchmark):
    """Samples whose keys end in a number; those with the same beginning are scored together."""

    name = title = "pairs"
    source = files = ""
    max_new_tokens = 4
    main_metric = "accuracy"

    def read(self):
        return []

    def score(self, answers):
        return {}

    def unit(self, key):
        return key.partition("/")[0]


def samples(sizes):
    return [
        Question(f"{unit}/{number}", "") if number else Skipped(f"{unit}/{number}", "is bad")
        for unit, size in enumerate(sizes)
        for number in range(size)
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(4, 50))
def test_a_limit_keeps_whole_units_and_no_more_samples_than_it_allows(tmp_path_factory, sizes, limit):
    from megatron_smar.evaluation.benchmark_run import spread

    benchmark, every = Pairs(tmp_path_factory.getbasetemp()), samples(sizes)
    kept = spread(benchmark, every, limit)
    assert 0 < len(kept) <= limit
    assert len({sample.key for sample in kept}) == len(kept)
    for unit in {benchmark.unit(sample.key) for sample in kept}:
        assert sum(benchmark.unit(sample.key) == unit for sample in kept) == sizes[int(unit)]
    if len(every) <= limit:
        assert kept == every


def test_a_limit_spreads_over_all_samples(tmp_path):
    from megatron_smar.evaluation.benchmark_run import spread

    kept = spread(Pairs(tmp_path), samples([1] * 100), 10)
    assert [int(sample.key.partition("/")[0]) for sample in kept] == list(range(0, 100, 10))


def test_a_limit_below_what_is_scored_together_is_refused(tmp_path):
    from megatron_smar.evaluation.benchmark_run import spread

    with pytest.raises(BenchmarkError, match="pairs scores 4 questions together"):
        spread(Pairs(tmp_path), samples([4, 4]), 3)


def predictions(path, resume=True, **of):
    from megatron_smar.evaluation.predictions import Predictions

    found = Predictions(path, {"benchmark": "pairs"} | of)
    found.open(resume)
    return found


def test_predictions_are_resumed_without_the_line_that_an_interruption_broke(tmp_path):
    path = tmp_path / "deep" / "pairs.jsonl"
    first = predictions(path)
    long = {"key": "1", "prediction": "a\nb\u2028é", "unfinished": True}
    first.add([long, {"key": "2", "skipped": "is bad"}], save=True)
    first.add([{"key": "9", "prediction": "another rank"}], save=False)
    with path.open("a") as file:
        file.write('{"key": "3", "predic')
    again = predictions(path)
    assert (again.texts, again.bad) == ({"1": "a\nb\u2028é"}, {}), "a skipped sample may have been repaired"
    again.add([{"key": "3", "prediction": ""}], save=True)
    assert again.unfinished == {"1"}
    assert [json.loads(line)["key"] for line in path.read_text().split("\n")[1:-1]] == ["1", "3"]


def test_predictions_of_another_model_are_refused_and_replaced_only_without_resuming(tmp_path):
    path = tmp_path / "pairs.jsonl"
    predictions(path, iteration=1).add([{"key": "1", "prediction": "a"}], save=True)
    with pytest.raises(BenchmarkError, match="remove the file, or give another --output"):
        predictions(path, iteration=2)
    assert predictions(path, resume=False, iteration=2).texts == {}
    assert json.loads(path.read_text()) == {"benchmark": "pairs", "iteration": 2}


def test_predictions_without_a_file_are_kept_in_memory():
    found = predictions(None)
    found.add([{"key": "1", "prediction": "a"}], save=True)
    assert found.texts == {"1": "a"}
