# SPDX-License-Identifier: Apache-2.0
"""Multimodal benchmarks during training, after each of Megatron's validations."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, print_rank_last

from megatron_smar.evaluation.benchmark_run import BenchmarkRunner, read_benchmarks
from megatron_smar.evaluation.encoder import run_evaluator


class TrainingBenchmarks:
    """Asks the benchmarks of --eval-benchmarks; Megatron calls it at the end of each validation.

    Megatron's name for such a function is `non_loss_data_func`. The model is in evaluation mode then, and what is
    trained afterwards does not depend on it.

    Args:
        args: The run's arguments.

    Raises:
        BenchmarkError: A benchmark is unknown, or its files are missing or of another version.
    """

    def __init__(self, args: Namespace) -> None:
        data, samples = Path(args.eval_benchmarks_data), args.eval_benchmarks_samples
        self._benchmarks = read_benchmarks(args.eval_benchmarks, data, samples)
        self._asked_at = -1

    def __call__(self, model: list[torch.nn.Module]) -> None:
        """Asks all benchmarks, logs their metrics, and saves predictions and results in --save."""
        args = get_args()
        iteration = max(getattr(args, "curr_iteration", -1) + 1, args.iteration)  # at the end of a run the latter
        if iteration == self._asked_at:  # Megatron validates once more after the last step
            return
        self._asked_at = iteration
        evaluator, encoder = run_evaluator(model, args.eval_benchmarks_batch_size)
        folder = Path(args.save) / "benchmarks" / f"iter_{iteration:07d}" if args.save else None
        runner = BenchmarkRunner(evaluator, encoder, folder, {"iteration": iteration}, resume=False)
        results = {read.name: runner.run(read) for read in self._benchmarks}
        print_rank_last("\n".join(_lines(results, iteration)))
        _write_scalars(results, iteration)
        if folder is not None and dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps({"benchmarks": results}, indent=1) + "\n", encoding="utf-8")


def training_benchmarks(args: Namespace) -> TrainingBenchmarks | None:
    """Reads the benchmarks of --eval-benchmarks, before training starts; None without the flag.

    Raises:
        BenchmarkError: As for `TrainingBenchmarks`.
    """
    return TrainingBenchmarks(args) if args.eval_benchmarks else None


def _lines(results: dict[str, Any], iteration: int) -> list[str]:
    """Returns a line per benchmark for the console, with the samples that were skipped."""
    lines = []
    for result in results.values():
        main = result["metrics"].get(result["main_metric"])
        value = "no metric" if main is None else f"{result['main_metric']} {main:.2f}"
        skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
        lines.append(f" {result['title']} at iteration {iteration} | {value} | {result['asked']} answers{skipped}")
        lines += [f"   skipped {sample['key']}: {sample['reason']}" for sample in result["skipped"][:3]]
    return lines


def _write_scalars(results: dict[str, Any], iteration: int) -> None:
    """Writes the metrics to TensorBoard and W&B, where the run has them."""
    scalars = {f"benchmark/{name}/{metric}": v for name, r in results.items() for metric, v in r["metrics"].items()}
    for name, result in results.items():
        distances = list(result["routing"]["mrd_distance_by_layer"].values())
        if distances:
            scalars[f"benchmark/{name}/mrd distance"] = sum(distances) / len(distances)
    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if (logger := get_wandb_writer()) is not None:
        logger.log(scalars, iteration)
