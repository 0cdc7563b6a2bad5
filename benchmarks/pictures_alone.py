# SPDX-License-Identifier: Apache-2.0
"""The limit of a data pipeline on this machine: decoding and tiling of the same pictures, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from megatron_smar.data import ImageConfig
from megatron_smar.data.tiling import ImageProcessor


class PicturesAlone(Dataset[int]):
    """The encoded pictures of each sample, in memory; gives the number of tiles that they were decoded to.

    Args:
        files: The pictures of each sample.
        config: How pictures become tiles.
    """

    def __init__(self, files: Sequence[Sequence[bytes]], config: ImageConfig) -> None:
        self.files, self.decode = files, ImageProcessor(config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        return sum(len(self.decode(file)) for file in self.files[index])


def decoded_pictures(pictures: PicturesAlone, size: int, workers: int, prefetch: int) -> Iterator[Counter[str]]:
    """Decodes pictures endlessly in workers, which send only numbers; yields the counts of each batch.

    Args:
        pictures: The pictures.
        size: Samples of a batch.
        workers: Number of worker processes.
        prefetch: Batches that a worker prepares ahead.
    """
    order = RandomSampler(pictures, num_samples=1_000_000, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(pictures, size, sampler=order, num_workers=workers, prefetch_factor=prefetch, collate_fn=list)
    for tiles in loader:
        yield Counter(samples=len(tiles), tiles=sum(tiles), tokens=0)
