# SPDX-License-Identifier: Apache-2.0
"""The multimodal benchmarks of the paper, one file each."""

from __future__ import annotations

from pathlib import Path

from megatron_smar.evaluation.benchmarks.base import Benchmark, BenchmarkError
from megatron_smar.evaluation.benchmarks.gqa import GQA
from megatron_smar.evaluation.benchmarks.mmbench import MMBench
from megatron_smar.evaluation.benchmarks.mme import MME
from megatron_smar.evaluation.benchmarks.mmvet import MMVet
from megatron_smar.evaluation.benchmarks.pope import POPE
from megatron_smar.evaluation.benchmarks.scienceqa import ScienceQA
from megatron_smar.evaluation.benchmarks.textvqa import TextVQA
from megatron_smar.evaluation.benchmarks.vizwiz import VizWiz
from megatron_smar.evaluation.benchmarks.vqav2 import VQAv2

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (VQAv2, GQA, VizWiz, ScienceQA, TextVQA, POPE, MME, MMBench, MMVet)  # the order of the paper
}


def open_benchmark(name: str, folder: Path) -> Benchmark:
    """Returns the benchmark with the files of a folder; they are read by its `read`.

    Raises:
        BenchmarkError: There is no such benchmark or folder.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"{name!r} is not a benchmark: choose one of {', '.join(BENCHMARKS)}")
    if not folder.is_dir():
        benchmark = BENCHMARKS[name]
        raise BenchmarkError(
            f"{folder} is not a folder: give the one with {benchmark.files} of {benchmark.title} "
            f"(from {benchmark.source})"
        )
    return BENCHMARKS[name](folder)
