# SPDX-License-Identifier: Apache-2.0
"""From a micro-batch of the loader to the model's inputs on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.routing.modalities import modality_ids_from_tokens


@dataclass(frozen=True)
class ModelBatch:
    """The model's inputs and the loss's, on this rank's device; s is this context-parallel rank's share.

    Attributes:
        input_ids: [b, s].
        position_ids: [b, s].
        modality_ids: [b, s]: 0 text, 1 vision, -1 padding.
        vision_index: [b, s], the row of a vision position's token among the features of all tiles; -1 elsewhere.
        labels: [b, s].
        loss_mask: [b, s] float.
        pixel_values: [tiles, 3, H, W]; None but on the first pipeline stage.
    """

    input_ids: Tensor
    position_ids: Tensor
    modality_ids: Tensor
    vision_index: Tensor
    labels: Tensor
    loss_mask: Tensor
    pixel_values: Tensor | None


def next_batch(
    data_iterator: Iterator[VisionLanguageBatch],
    image_token_id: int,
    tokens_per_tile: int,
    with_images: bool,
    pg_collection: ProcessGroupCollection,
) -> ModelBatch:
    """Reads one micro-batch.

    Every rank of a data-parallel replica reads the same samples itself: no broadcast, so no rank can wait for another,
    and each pipeline stage knows the modalities. Only the first stage has images.

    Raises:
        ValueError: The tiles do not fill the placeholders exactly.
    """
    return prepare_batch(next(data_iterator), image_token_id, tokens_per_tile, with_images, pg_collection)


def prepare_batch(
    batch: VisionLanguageBatch,
    image_token_id: int,
    tokens_per_tile: int,
    with_images: bool,
    pg_collection: ProcessGroupCollection,
) -> ModelBatch:
    """As `next_batch`, for a batch at hand."""
    is_vision = batch.input_ids == image_token_id
    if with_images:
        # Counted on the host, where the batch still is: a device would have to be synchronised with.
        places, features = int(is_vision.sum()), batch.pixel_values.shape[0] * tokens_per_tile
        if places != features:
            raise ValueError(
                f"a micro-batch has {places} image placeholder tokens but its {batch.pixel_values.shape[0]} tiles give "
                f"{features} ({tokens_per_tile} each); samples {list(batch.__key__)}."
            )
    order = (is_vision.flatten().cumsum(0) - 1).view_as(is_vision)
    sequences = {
        "input_ids": batch.input_ids,
        "position_ids": torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids),
        "modality_ids": modality_ids_from_tokens(batch.input_ids, image_token_id, batch.padding_mask),
        "vision_index": torch.where(is_vision, order, -1),
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
    }
    sequences = {name: tensor.cuda(non_blocking=True) for name, tensor in sequences.items()}
    if pg_collection.cp.size() > 1:
        sequences = get_batch_on_this_cp_rank(sequences, is_hybrid_cp=False, cp_group=pg_collection.cp)
    pixel_values = batch.pixel_values.cuda(non_blocking=True) if with_images else None
    return ModelBatch(**sequences, pixel_values=pixel_values)
