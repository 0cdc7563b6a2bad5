# SPDX-License-Identifier: Apache-2.0
"""An encoded sample, and the micro-batch that the model receives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from megatron.energon import Batch, Sample
from megatron.energon.edataclass import edataclass
from torch.utils.data import get_worker_info

from megatron_smar.data.tiling import join_tiles


@edataclass
class TokenizedSample(Sample):
    """A sample whose images are not decoded yet, so that many samples fit into the packing buffer.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, the token to predict at each position.
        loss_mask: [n] float32.
        num_tiles: Number of tiles that the sample's images give.
        files: The sample's image files, encoded.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    num_tiles: int
    files: list[bytes]


@edataclass
class EncodedSample(Sample):
    """A sample, not padded.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, the token to predict at each position.
        loss_mask: [n] float32.
        pixel_values: [tiles, 3, H, W] uint8.
        num_images: Number of the sample's images, whether or not this rank decodes them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    pixel_values: torch.Tensor
    num_images: int = 0


@edataclass
class Pack(Sample):
    """Samples that share a sequence.

    Attributes:
        samples: The samples, in their order in the sequence.
    """

    samples: list[EncodedSample]


@edataclass
class VisionLanguageBatch(Batch):
    """A micro-batch.

    Attributes:
        input_ids: [b, s] int64, with one image placeholder per vision token.
        labels: [b, s] int64; `labels[i]` is the token to predict at position i. Where `loss_mask` is 0, any value.
        loss_mask: [b, s] float32; 1 where the loss counts.
        padding_mask: [b, s] bool; True is padding, as in Megatron.
        pixel_values: [tiles, 3, H, W] uint8, in the order of the placeholders (row by row); [0, 3, H, W] without tiles.
        lengths: [sequences] int64, the lengths of a pack's sequences, each a sample with its padding; their sum is s,
            and b is 1. None without packing.
        num_text_only: Number of samples without an image.
        step_tokens: Loss tokens per micro-batch of the training step, over all replicas, [] on the device; None if
            nothing needs them.
        loss_weights: [b, s] float32, the weight of each position in the loss; None without --loss-weighting.
        step_weight: Sum of `loss_weights` per micro-batch of the training step, over all replicas, [] on the device;
            None without --loss-weighting.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding_mask: torch.Tensor
    pixel_values: torch.Tensor
    lengths: torch.Tensor | None = None
    num_text_only: int = 0
    step_tokens: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    step_weight: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields, for a worker's message to the training process; the tiles alone in shared memory.

        torch gives each tensor shared memory of its own and passes it through a socket of its own, which takes longer
        than to copy the few kilobytes of the others with the message, as arrays.
        """
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        small = {name: value for name, value in state.items() if name != "pixel_values" and _is_on_host(value)}
        return state | {name: value.numpy() for name, value in small.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets the fields from what `__getstate__` returned."""
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def _is_on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def collate(
    rows: Sequence[Sequence[EncodedSample]], *, num_rows: int, length: int, pad_id: int, multiple: int | None = None
) -> VisionLanguageBatch:
    """Pads samples to one micro-batch.

    Args:
        rows: The samples of each row, concatenated in this order; without packing, one sample per row.
        num_rows: Number of rows, b. Rows without a sample are padding only, because pipelines need a fixed shape.
        length: Length of each row, s.
        pad_id: Token id of padding.
        multiple: With packing, each sample is padded to a multiple of this, and the rest of the row is a separate
            sequence. None without packing.
    """
    shape = (num_rows, length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(shape)
    padding_mask = torch.ones(shape, dtype=torch.bool)
    lengths: list[int] = []
    for row, in_row in enumerate(rows):
        start = 0
        for sample in in_row:
            place = (row, slice(start, start + len(sample.input_ids)))
            input_ids[place] = sample.input_ids
            labels[place] = sample.labels
            loss_mask[place] = sample.loss_mask
            padding_mask[place] = False
            lengths.append(padded_length(len(sample.input_ids), multiple or 1))
            start += lengths[-1]
    if sum(lengths) < length:
        lengths.append(length - sum(lengths))
    samples = [sample for in_row in rows for sample in in_row]
    return VisionLanguageBatch(
        __key__=[sample.__key__ for sample in samples],
        __restore_key__=tuple(sample.__restore_key__ for sample in samples),
        input_ids=input_ids,
        labels=labels,
        loss_mask=loss_mask,
        padding_mask=padding_mask,
        pixel_values=_gather_tiles([sample.pixel_values for sample in samples]),
        lengths=None if multiple is None else torch.tensor(lengths),
        num_text_only=sum(not sample.num_images for sample in samples),
    )


def _gather_tiles(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates the tiles of the samples, each [n, 3, H, W]."""
    if get_worker_info() is None or not any(map(len, tiles)):
        return join_tiles(tiles)
    return _in_shared_memory([some.permute(0, 2, 3, 1) for some in tiles]).permute(0, 3, 1, 2)


def _in_shared_memory(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates tensors into memory that a worker process hands to the training process without a copy.

    They are written to it as to a file. Through a mapping, as `default_collate` does it, the kernel would first fill
    each page with zeros and then interrupt the worker at its first use, which takes twice as long as the rest.
    """
    size = sum(of_sample.nbytes for of_sample in tiles)
    with open(os.memfd_create("tiles"), "wb") as file:
        for of_sample in tiles:
            file.write(of_sample.contiguous().numpy())
        file.flush()
        storage = torch.UntypedStorage._new_shared_fd_cpu(file.fileno(), size)  # type: ignore[attr-defined]  # maps it
    first = tiles[0]
    return torch.empty(0, dtype=first.dtype).set_(storage).view(-1, *first.shape[1:])


def padded_length(length: int, multiple: int) -> int:
    """Returns `length`, rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple
