# SPDX-License-Identifier: Apache-2.0
"""The table of the multimodal benchmarks."""

import pytest

from megatron_smar.evaluation.benchmarks import BENCHMARKS, open_benchmark
from megatron_smar.evaluation.benchmarks.base import BenchmarkError


def test_the_papers_nine_benchmarks_are_there_and_describe_themselves():
    assert list(BENCHMARKS) == "vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench mmvet".split()
    for benchmark in BENCHMARKS.values():
        assert benchmark.title and benchmark.files and benchmark.main_metric and benchmark.max_new_tokens
        assert "arXiv" in benchmark.source and "https://" in benchmark.source


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_empty_folder_is_refused_with_what_has_to_be_in_it(name, tmp_path):
    benchmark = open_benchmark(name, tmp_path)
    with pytest.raises(BenchmarkError) as error:
        benchmark.read()
    assert str(tmp_path) in str(error.value)
    assert benchmark.files in str(error.value)


def test_an_unknown_benchmark_or_folder_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="'vqa' is not a benchmark: choose one of vqav2, gqa"):
        open_benchmark("vqa", tmp_path)
    with pytest.raises(BenchmarkError, match=r"none is not a folder: give the one with testdev_balanced"):
        open_benchmark("gqa", tmp_path / "none")
