# SPDX-License-Identifier: Apache-2.0
"""Runs a multimodal benchmark over all ranks, and resumes after an interruption from the predictions that are saved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import get_args
from tqdm import tqdm

from megatron_smar.config.build import get_run_config
from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.rejects import SampleError
from megatron_smar.evaluation.benchmarks import open_benchmark
from megatron_smar.evaluation.benchmarks.base import Answer, Benchmark, BenchmarkError, Question, Skipped
from megatron_smar.evaluation.encoder import HeldOutEncoder
from megatron_smar.evaluation.evaluator import Evaluator
from megatron_smar.evaluation.generation import generate_own
from megatron_smar.evaluation.predictions import Predictions
from megatron_smar.monitoring.recorder import RoutingRecorder, recorded_routing

# The routing of a benchmark is measured on at most this many questions: MME has 2,374, of which the paper takes 2,300.
ROUTING_SAMPLES = 2300


@dataclass(frozen=True)
class ReadBenchmark:
    """A benchmark whose files have been read.

    Attributes:
        benchmark: The benchmark.
        questions: The questions to ask.
        skipped: The samples that cannot be asked.
        limit: Largest number of questions that was asked for; None for all.
    """

    benchmark: Benchmark
    questions: list[Question]
    skipped: list[Skipped]
    limit: int | None = None

    @property
    def name(self) -> str:
        """The benchmark's name on the command line."""
        return self.benchmark.name


def read_benchmarks(names: Sequence[str], data: Path, limit: int | None = None) -> list[ReadBenchmark]:
    """Reads the files of benchmarks, before a model is loaded.

    Args:
        names: Names of benchmarks.
        data: Folder with a folder for each of them, of the same name.
        limit: Largest number of questions of each, spread evenly over its samples; None for all.

    Raises:
        BenchmarkError: A benchmark is unknown, or its files are missing or of another version.
    """
    found = []
    for name in names:
        benchmark = open_benchmark(name, data / name)
        samples = benchmark.read()
        kept = samples if limit is None else spread(benchmark, samples, limit)
        questions = [sample for sample in kept if isinstance(sample, Question)]
        skipped = [sample for sample in kept if isinstance(sample, Skipped)]
        found.append(ReadBenchmark(benchmark, questions, skipped, limit))
    return found


def spread(benchmark: Benchmark, samples: Sequence[Question | Skipped], limit: int) -> list[Question | Skipped]:
    """Returns at most `limit` samples, evenly spread; samples that are scored together are all kept or all left out.

    Raises:
        BenchmarkError: The limit is smaller than the first of such units.
    """
    units: dict[str, list[Question | Skipped]] = {}
    for sample in samples:
        units.setdefault(benchmark.unit(sample.key), []).append(sample)
    if len(samples) <= limit:
        return list(samples)
    number = max(1, limit * len(units) // len(samples))
    kept = [unit for place, unit in enumerate(units.values()) if place * number % len(units) < number][:number]
    while sum(map(len, kept)) > limit and len(kept) > 1:
        kept.pop()
    if sum(map(len, kept)) > limit:
        raise BenchmarkError(
            f"{benchmark.title} scores {len(kept[0])} questions together: give a limit of at least that"
        )
    return [sample for unit in kept for sample in unit]


class BenchmarkRunner:
    """Asks a model the questions of benchmarks.

    Args:
        evaluator: Holds the model.
        encoder: Encodes the questions.
        folder: Folder for the predictions and for what a benchmark's server takes; None to write no files.
        model: Identifies the model in the files of predictions.
        resume: Whether predictions that are there already are kept.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        encoder: HeldOutEncoder,
        folder: Path | None,
        model: dict[str, Any],
        resume: bool = True,
    ) -> None:
        self.evaluator, self.encoder, self.folder = evaluator, encoder, folder
        self.model, self.resume = model, resume

    def run(self, read: ReadBenchmark) -> dict[str, Any]:
        """Asks all questions of a benchmark, and returns its results on all ranks.

        Raises:
            BenchmarkError: The file of predictions belongs to another model or version.
        """
        self._compare(read)
        predictions = self._begin(read)
        left = [question for question in read.questions if question.key not in predictions.texts]
        done = len(read.questions) - len(left)
        with tqdm(
            total=len(read.questions), initial=done, desc=read.name, unit="question", disable=dist.get_rank() > 0
        ) as bar:
            for chunk in self._chunks(left):
                records = self._answer(read.benchmark, chunk)
                predictions.add(records, save=dist.get_rank() == 0)
                bar.update(len(chunk))
        return self._result(read, predictions) | {"routing": self._routing(read)}

    def _compare(self, read: ReadBenchmark) -> None:
        """Refuses files that differ from rank to rank, as on local disks: the ranks would wait for each other forever.

        Raises:
            BenchmarkError: On all ranks, if they differ.
        """
        digest = hashlib.sha256("\n".join(question.key for question in read.questions).encode()).hexdigest()
        found: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
        dist.all_gather_object(found, (len(read.questions), digest))
        if len(set(found)) > 1:
            numbers = ", ".join(str(number) for number, _ in found)
            raise BenchmarkError(
                f"{read.benchmark.folder} does not have the same questions and pictures on all ranks ({numbers} "
                "questions): copy the folder to all nodes"
            )

    def _begin(self, read: ReadBenchmark) -> Predictions:
        """Opens the predictions on rank 0, and returns the same on all ranks."""
        of = self.model | {"benchmark": read.name, "version": read.benchmark.version, "limit": read.limit}
        shared: list[Any] = [None]
        if dist.get_rank() == 0:
            mine = Predictions(self.folder / f"{read.name}.jsonl" if self.folder else None, of)
            try:
                mine.open(self.resume)
                shared = [mine]
            except BenchmarkError as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], BenchmarkError):
            raise shared[0]
        return shared[0]

    def _chunks(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        size = 4 * self.evaluator.batch_size * self.evaluator.groups.dp.size()
        return [questions[start : start + size] for start in range(0, len(questions), size)]

    def _answer(self, benchmark: Benchmark, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Returns a record per question, in order, on all ranks."""
        prompts, records = self._own_prompts(questions)
        positions, ends = get_args().max_position_embeddings, self.encoder.end_ids
        limits = [min(benchmark.max_new_tokens, positions - len(prompt.input_ids)) for prompt in prompts]
        new = generate_own(self.evaluator, prompts, limits, lambda _, ids: ids[-1] in ends)
        for prompt, ids in zip(prompts, new, strict=True):
            unfinished = {} if ids[-1] in ends else {"unfinished": True}
            records.append({"key": prompt.__key__, "prediction": self.encoder.answer(ids)} | unfinished)
        group = self.evaluator.groups.dp
        gathered: list[list[dict[str, Any]]] = [[]] * group.size()
        dist.all_gather_object(gathered, records, group=group)
        by_key = {record["key"]: record for part in gathered for record in part}
        return [by_key[question.key] for question in questions]

    def _own_prompts(self, questions: Sequence[Question]) -> tuple[list[EncodedSample], list[dict[str, Any]]]:
        """Encodes this replica's share of the questions; returns also a record for each that cannot be asked."""
        group, positions = self.evaluator.groups.dp, get_args().max_position_embeddings
        prompts, records = [], []
        for question in questions[group.rank() :: group.size()]:
            try:
                prompt = self.encoder.prompt(question)
                if len(prompt.input_ids) >= positions:
                    raise SampleError("too_long", f"its prompt leaves no room for an answer in {positions} positions")
                prompts.append(prompt)
            except SampleError as error:
                records.append({"key": question.key, "skipped": error.message})
        return prompts, records

    def _result(self, read: ReadBenchmark, predictions: Predictions) -> dict[str, Any]:
        benchmark = read.benchmark
        questions = [question for question in read.questions if question.key in predictions.texts]
        answers = [Answer(question, predictions.texts[question.key]) for question in questions]
        skipped = [{"key": sample.key, "reason": sample.reason} for sample in read.skipped]
        skipped += [{"key": key, "reason": reason} for key, reason in predictions.bad.items()]
        files = benchmark.submission(answers) if self.folder else {}
        paths = [str(self.folder / name) for name in files] if self.folder else []
        if dist.get_rank() == 0:
            for path, text in zip(paths, files.values(), strict=True):
                Path(path).write_text(text, encoding="utf-8")
        return {
            "title": benchmark.title,
            "version": benchmark.version,
            "main_metric": benchmark.main_metric,
            "metrics": benchmark.score(answers),
            "asked": len(answers),
            "unfinished": len(predictions.unfinished),
            "limit": read.limit,
            "skipped": skipped,
            "files": paths,
        }

    def _routing(self, read: ReadBenchmark) -> dict[str, Any]:
        """Passes prompts through the model once, and returns the MRD distance and the experts' shares per layer."""
        questions = spread(read.benchmark, read.questions, ROUTING_SAMPLES)
        size = self.evaluator.batch_size * self.evaluator.groups.dp.size()
        chunks = [questions[start : start + size] for start in range(0, len(questions), size)]
        number, group = 0, self.evaluator.groups.dp
        with recorded_routing([self.evaluator.model]) as recorder:
            for chunk in tqdm(chunks, desc=f"{read.name}, routing", unit="batch", disable=dist.get_rank() > 0):
                prompts, _ = self._own_prompts([question for question in chunk if isinstance(question, Question)])
                self.evaluator.pass_through(prompts)
                number += len(prompts)
        if get_run_config().routing.scope == "local":  # the routers' sums are then those of each replica
            recorder.reduce(group)
        numbers = [0] * group.size()
        dist.all_gather_object(numbers, number, group=group)
        return {"samples": sum(numbers)} | routing_result(recorder, self.encoder)


def routing_result(recorder: RoutingRecorder, encoder: HeldOutEncoder) -> dict[str, Any]:
    """Returns the MRD distance and each modality's share of token slots per expert, by layer."""
    args, shares = get_args(), recorder.expert_shares()
    return {
        "mrd_distance_by_layer": recorder.distances(args.moe_router_topk, args.smar_eps) if shares else {},
        "expert_share": {
            modality.name: {layer: share[modality.id].tolist() for layer, share in shares.items()}
            for modality in encoder.text.modalities
        },
    }
