# SPDX-License-Identifier: Apache-2.0
"""One encoded sample, and the micro-batch that the model is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.energon import Batch, Sample
from megatron.energon.edataclass import edataclass
from torch.utils.data import default_collate


@edataclass
class TokenizedSample(Sample):
    """One sample whose images are not decoded yet, so that many of them can wait to be packed.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, the token to predict at each position.
        loss_mask: [n] float32.
        num_tiles: Tiles that its images give.
        files: Its image files.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    num_tiles: int
    files: list[bytes]


@edataclass
class EncodedSample(Sample):
    """One sample, not padded.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, the token to predict at each position.
        loss_mask: [n] float32.
        pixel_values: [tiles, 3, H, W] uint8.
        num_images: Its images, decoded here or not.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    pixel_values: torch.Tensor
    num_images: int = 0


@edataclass
class Pack(Sample):
    """Samples that share a row.

    Attributes:
        samples: In their order.
    """

    samples: list[EncodedSample]


@edataclass
class VisionLanguageBatch(Batch):
    """One micro-batch.

    Attributes:
        input_ids: [b, s] int64; one image placeholder per vision token is in place.
        labels: [b, s] int64; `labels[i]` is the token to predict at position i; anything where `loss_mask` is 0.
        loss_mask: [b, s] float32; 1 where the loss counts.
        padding_mask: [b, s] bool; True is padding, as in Megatron.
        pixel_values: [tiles, 3, H, W] uint8, in the order of the placeholders (row by row); no tiles is [0, 3, H, W].
        lengths: [sequences] int64, the lengths of a pack's sequences, each a sample with its padding; their sum is s,
            and b is 1. None without packing.
        num_text_only: Samples in it that have no image.
        step_tokens: Loss tokens per micro-batch of the training step, over all replicas, [] on the device; None where
            nothing needs them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding_mask: torch.Tensor
    pixel_values: torch.Tensor
    lengths: torch.Tensor | None = None
    num_text_only: int = 0
    step_tokens: torch.Tensor | None = None


def collate(
    rows: Sequence[Sequence[EncodedSample]], *, num_rows: int, length: int, pad_id: int, multiple: int | None = None
) -> VisionLanguageBatch:
    """Pads samples to one micro-batch.

    Args:
        rows: Of each row the samples that stand in it one behind the other; without packing one each.
        num_rows: b; rows without a sample are padding throughout, since pipelines need one shape.
        length: s.
        pad_id: Token id of padding.
        multiple: For packs, in one row: each sample is padded to a multiple of this, and what is left of the row is a
            sequence of its own. None without packing.
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
    """Puts together the tiles of samples, each [n, 3, H, W]."""
    single = [tile for of_sample in tiles for tile in of_sample]
    # In a worker process torch's function writes to shared memory, where they would have to be copied later.
    return default_collate(single) if single else tiles[0]


def padded_length(length: int, multiple: int) -> int:
    """Returns `length`, rounded up to a multiple."""
    return -(-length // multiple) * multiple
