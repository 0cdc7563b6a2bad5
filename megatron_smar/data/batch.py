# SPDX-License-Identifier: Apache-2.0
"""One encoded sample, and the micro-batch that the model is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.energon import Batch, Sample
from megatron.energon.edataclass import edataclass


@edataclass
class EncodedSample(Sample):
    """One sample, not padded.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, the token to predict at each position.
        loss_mask: [n] float32.
        pixel_values: [tiles, 3, H, W] float32.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    pixel_values: torch.Tensor


@edataclass
class VisionLanguageBatch(Batch):
    """One micro-batch.

    Attributes:
        input_ids: [b, s] int64; one image placeholder per vision token is in place.
        labels: [b, s] int64; ``labels[i]`` is the token to predict at position i; anything where `loss_mask` is 0.
        loss_mask: [b, s] float32; 1 where the loss counts.
        padding_mask: [b, s] bool; True is padding, as in Megatron.
        pixel_values: [tiles, 3, H, W] float32, in the order of the placeholders (row by row); no tiles is [0, 3, H, W].
        lengths: [sequences] int64, the lengths of a pack's sequences, each a sample with its padding; their sum is s,
            and b is 1. None without packing.
        num_text_only: Samples in it that have no image.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding_mask: torch.Tensor
    pixel_values: torch.Tensor
    lengths: torch.Tensor | None = None
    num_text_only: int = 0


def collate(samples: Sequence[EncodedSample], *, rows: int, length: int, pad_id: int) -> VisionLanguageBatch:
    """Pad samples to one micro-batch.

    Args:
        samples: At most `rows` samples of at most `length` tokens.
        rows: b; rows without a sample are padding throughout, since pipelines need one shape.
        length: s.
        pad_id: Token id of padding.
    """
    input_ids = torch.full((rows, length), pad_id, dtype=torch.int64)
    labels = torch.full((rows, length), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(rows, length)
    padding_mask = torch.ones(rows, length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[row, :n] = sample.input_ids
        labels[row, :n] = sample.labels
        loss_mask[row, :n] = sample.loss_mask
        padding_mask[row, :n] = False
    return VisionLanguageBatch(
        __key__=[sample.__key__ for sample in samples],
        __restore_key__=tuple(sample.__restore_key__ for sample in samples),
        input_ids=input_ids,
        labels=labels,
        loss_mask=loss_mask,
        padding_mask=padding_mask,
        pixel_values=torch.cat([sample.pixel_values for sample in samples]),
    )
