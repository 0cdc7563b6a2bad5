# SPDX-License-Identifier: Apache-2.0
"""Blends of several sources: checks that every worker can keep the blend's shares, and wrappers that keep them.

`MixtureDataset` keeps the shares in validation, `RatioDataset` a fixed share of text-only samples in training.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
from megatron.energon.flavors.webdataset.sharder import Sharder
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from megatron_smar.data.rejects import DataError

TEXT_PART, IMAGE_PART = "train_text", "train_image"


def num_samples(source: LoadedDataset) -> int:
    """Returns the number of samples of a source, over all workers."""
    dataset: Any = source.dataset
    if dataset.subset is None:
        return len(dataset)
    start, end = dataset.subset.compute_subset(len(dataset))
    return end - start


def blend_weight(source: LoadedDataset) -> float:
    """Returns a source's weight in its blend; with `repetitions`, its number of samples times the repetitions."""
    if source.repetitions is not None:
        return num_samples(source) * source.repetitions
    return 1.0 if source.weight is None else float(source.weight)


def check_sizes(sources: Sequence[LoadedDataset], workers: WorkerConfig, place: str, kind: str) -> None:
    """Checks that every worker of every rank has samples of every source.

    energon divides each source among all workers, and a worker without samples of a source reads the other sources
    instead. The check covers all ranks, so that every rank reports the same error.

    Args:
        sources: The sources, as energon loaded them.
        workers: The ranks and their workers.
        place: Flag and path, for the message.
        kind: What is counted, for the message.

    Raises:
        DataError: A source has too few samples.
    """
    total, layout = _count(workers)
    for source in sources:
        # energon rounds a fraction of a repetition down on each worker.
        part = math.modf(source.repetitions or 1)[0] or 1
        samples = num_samples(source)
        if samples * part >= total:
            continue
        if len(sources) == 1:
            raise DataError(
                f"{place} has fewer {kind} than there are workers ({layout}), only {samples}: lower --num-workers, or "
                "prepare more."
            )
        repeated = f", repeated {source.repetitions} times," if part < 1 else ""
        raise DataError(
            f"{place}: the source {source.dataset.paths[0]} has {samples} {kind}{repeated} for {total} workers "
            f"({layout}), and the blend's shares would change if some workers had none of them: lower "
            "--num-workers, or switch the source off with weight 0."
        )


def check_ranks(source: LoadedDataset, workers: WorkerConfig, place: str, kind: str) -> None:
    """Checks that every rank has samples of a single source; some of a rank's workers may have none.

    Raises:
        DataError: A rank has no samples.
    """
    samples = num_samples(source)
    for rank in range(workers.world_size):
        place_of_rank = WorkerConfig(rank=rank, world_size=workers.world_size, num_workers=workers.num_workers)
        ends = Sharder.split_samples_to_workers(0, samples, place_of_rank)
        if ends[0] == ends[-1]:
            total, layout = _count(workers)
            raise DataError(
                f"{place} has no {kind} for data-parallel rank {rank} of {workers.world_size}, only {samples} in all: "
                f"it needs at least {total} for {layout} workers."
            )


def _count(workers: WorkerConfig) -> tuple[int, str]:
    of_rank = max(1, workers.num_workers)
    return workers.world_size * of_rank, f"{workers.world_size} data-parallel ranks x {of_rank}"


def split_by_image(
    datasets: Sequence[LoadedDataset], blend_mode: DatasetBlendMode
) -> tuple[list[LoadedDataset], list[LoadedDataset]]:
    """Splits each source of a blend into its text-only shards and its shards with images.

    A source's weight is divided between the two parts in proportion to their numbers of samples, so that the blend's
    proportions hold within each kind.

    Args:
        datasets: The sources, as energon loaded them; each is a folder made by `tools/data/prepare.py`.
        blend_mode: Whether the blend gives weights or repetitions.

    Returns:
        The text-only sources and the sources with images, with their weights.

    Raises:
        DataError: There are no text-only shards or none with images, a folder's split file does not say which shards
            are which, or the blend gives repetitions instead of weights.
    """
    if blend_mode == DatasetBlendMode.SAMPLE_REPETITIONS:
        raise DataError("--text-only-ratio needs a metadataset with `blend` and weights, not `blend_epochized`.")
    parts: dict[str, list[LoadedDataset]] = {TEXT_PART: [], IMAGE_PART: []}
    for dataset in datasets:
        source: Any = dataset.dataset
        if source.subset is not None:
            raise DataError(
                f"--text-only-ratio needs all of {source.path}, but the blend has a `subset` of it: take it out, or "
                "prepare the samples that are wanted in a folder of their own."
            )
        found = {name: part for name in parts if (part := _part_of(source, name)) is not None}
        if sum(len(part.shards) for part in found.values()) != len(source.shards):
            raise DataError(
                f"--text-only-ratio needs to know which shards of {source.path} are text only, but its split file has "
                f"no {TEXT_PART} and {IMAGE_PART} for them all: make the folder with tools/data/prepare.py."
            )
        weight = 1.0 if dataset.weight is None else float(dataset.weight)
        for name, part in found.items():
            share = weight * len(part) / len(source)
            parts[name].append(LoadedDataset(dataset=part, weight=share, aux=dataset.aux))
    for name, kind in ((TEXT_PART, "text-only samples"), (IMAGE_PART, "samples with images")):
        if not parts[name]:
            raise DataError(f"--text-only-ratio mixes two kinds of samples, but the data has no {kind}: leave it out.")
    return parts[TEXT_PART], parts[IMAGE_PART]


def _part_of(source: Any, split_part: str) -> Any:
    """Returns a copy of an energon dataset factory with only the shards of another split part, None without any."""
    try:
        names = set(WebdatasetMeta.from_config(path=source.path, split_part=split_part).split_part_files)
    except (AssertionError, EmptyDatasetError):  # what energon raises if the split file has no such part
        return None
    part = copy.copy(source)
    part.shards = [shard for shard in source.shards if shard.name in names]
    return part if part.shards else None


class MixtureDataset[T](BaseWrapperDataset[T, T]):
    """Interleaves endless datasets by weight; no dataset's share deviates by more than about one sample.

    A pass ends when every dataset has been read at least once; small datasets repeat. Each worker starts one turn later
    in the sequence of turns than the worker before it, so that the shares also hold in every step, over all workers.

    Args:
        datasets: Endless datasets.
        weights: Weight of each dataset.
        worker_config: energon's worker configuration.
    """

    _savable_fields = ()

    def __init__(
        self, datasets: Sequence[SavableDataset[T]], weights: Sequence[float], *, worker_config: WorkerConfig
    ) -> None:
        super().__init__(tuple(datasets), worker_config=worker_config)
        self.shares = [weight / sum(weights) for weight in weights]

    def reset_state_own(self) -> None:
        """Does nothing: there is no state, a pass always starts from the beginning."""

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Returns the number of samples of a pass on a worker, to within one sample."""
        lengths = [dataset.len_worker(worker_idx) for dataset in self.datasets]
        return max(math.ceil(length / share - 1e-9) for length, share in zip(lengths, self.shares, strict=True))

    def __iter__(self) -> Iterator[T]:
        """Yields the samples of one pass."""
        iterators = [iter(dataset) for dataset in self.datasets]
        left = [dataset.len_worker() for dataset in self.datasets]
        owed = [0.0] * len(iterators)
        for turn in itertools.count(-self.worker_config.global_worker_id()):
            owed = [amount + share for amount, share in zip(owed, self.shares, strict=True)]
            index = max(range(len(owed)), key=owed.__getitem__)
            owed[index] -= 1
            if turn < 0:
                continue
            yield add_sample_restore_key(next(iterators[index]), index, src=self)
            left[index] -= 1
            if max(left) <= 0:
                return

    def config(self) -> dict[str, Any]:
        """Returns the settings that determine the order of samples, as energon's wrappers do."""
        return {
            "type": type(self).__qualname__,
            "datasets": [dataset.config() for dataset in self.datasets],
            "shares": self.shares,
            "worker_config": self.worker_config.config(),
        }


class RatioDataset[T](BaseWrapperDataset[T, T]):
    """Interleaves two endless datasets; the first dataset's share deviates from `ratio` by less than one sample.

    Every worker keeps the ratio separately, and the workers are out of phase, so that all of them together keep it too.

    Args:
        first: Endless dataset.
        second: Endless dataset.
        ratio: Share of `first`.
        worker_config: energon's worker configuration.
    """

    _savable_fields = ("_drawn",)

    def __init__(
        self, first: SavableDataset[T], second: SavableDataset[T], ratio: float, *, worker_config: WorkerConfig
    ) -> None:
        super().__init__((first, second), worker_config=worker_config)
        self.ratio = Fraction(str(ratio))  # exact: 0.025 is 1/40, which a float cannot represent
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Starts again from no samples read."""
        self._drawn = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Returns the number of samples of both datasets on a worker; 0 if either has none there."""
        lengths = [dataset.len_worker(worker_idx) for dataset in self.datasets]
        return sum(lengths) if all(lengths) else 0

    def __iter__(self) -> Iterator[T]:
        """Yields samples endlessly."""
        workers = max(1, self.worker_config.num_workers) * self.worker_config.world_size
        phase = Fraction(2 * self.worker_config.global_worker_id() + 1, 2 * workers)
        iterators = [iter(dataset) for dataset in self.datasets]
        while True:
            before = math.floor(self._drawn * self.ratio + phase)
            index = 0 if math.floor((self._drawn + 1) * self.ratio + phase) > before else 1
            sample = next(iterators[index])
            self._drawn += 1
            yield add_sample_restore_key(sample, index, src=self)

    def config(self) -> dict[str, Any]:
        """Returns the settings that determine the order of samples, as energon's wrappers do."""
        return {
            "type": type(self).__qualname__,
            "datasets": [dataset.config() for dataset in self.datasets],
            "ratio": str(self.ratio),
            "worker_config": self.worker_config.config(),
        }
