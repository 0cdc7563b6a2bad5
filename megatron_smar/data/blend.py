# SPDX-License-Identifier: Apache-2.0
"""A fixed share of text-only samples, held exactly rather than on average."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from megatron_smar.data.rejects import DataError

TEXT_PART, IMAGE_PART = "train_text", "train_image"


def split_by_image(
    datasets: Sequence[LoadedDataset], blend_mode: DatasetBlendMode
) -> tuple[list[LoadedDataset], list[LoadedDataset]]:
    """Take the sources of a blend apart into their text-only shards and those with images.

    The weight of a source is shared between its two parts by their numbers of samples, so that within each kind the
    blend's proportions stay.

    Args:
        datasets: As energon loaded them, each a folder made by ``tools/data/prepare.py``.
        blend_mode: What the blend's numbers mean.

    Returns:
        The text-only sources and those with images, with weights.

    Raises:
        DataError: There is no text-only shard or none with images, a folder does not say which shards are which, or the
            blend counts repetitions instead of giving weights.
    """
    if blend_mode == DatasetBlendMode.SAMPLE_REPETITIONS:
        raise DataError("--text-only-ratio needs a metadataset with `blend` and weights, not `blend_epochized`.")
    parts: dict[str, list[LoadedDataset]] = {TEXT_PART: [], IMAGE_PART: []}
    for dataset in datasets:
        source: Any = dataset.dataset
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
    """Return a copy of an energon dataset factory with the shards of another split part alone, None if it has none."""
    try:
        names = set(WebdatasetMeta.from_config(path=source.path, split_part=split_part).split_part_files)
    except (AssertionError, EmptyDatasetError):  # energon's ways to say that the split file has no such part
        return None
    part = copy.copy(source)
    part.shards = [shard for shard in source.shards if shard.name in names]
    return part if part.shards else None


class RatioDataset[T](BaseWrapperDataset[T, T]):
    """Draws from two endless datasets so that the first one's share never strays from its ratio by a whole sample.

    Every worker holds the ratio by itself, and workers are out of step with each other, so that the samples of all of
    them together hold it too.

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
        """Begin at no sample drawn."""
        super().__init__((first, second), worker_config=worker_config)
        self.ratio = Fraction(str(ratio))  # 0.025 is 1/40, which no binary fraction is
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Begin at no sample drawn."""
        self._drawn = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Return the samples of both on a worker; none if one of them has none there."""
        lengths = [dataset.len_worker(worker_idx) for dataset in self.datasets]
        return sum(lengths) if all(lengths) else 0

    def __iter__(self) -> Iterator[T]:
        """Yield samples for ever."""
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
        """Return what decides the order of samples, as energon's wrappers do."""
        return {
            "type": type(self).__qualname__,
            "datasets": [dataset.config() for dataset in self.datasets],
            "ratio": str(self.ratio),
            "worker_config": self.worker_config.config(),
        }
