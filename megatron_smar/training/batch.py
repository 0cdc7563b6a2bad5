# SPDX-License-Identifier: Apache-2.0
"""From a micro-batch of the loader to the model's inputs on this rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.model.context_parallel import zigzag_positions
from megatron_smar.routing.modalities import TEXT, modality_ids_from_tokens


@dataclass(frozen=True)
class ModelBatch:
    """The model's inputs and the loss's, on this rank's device; s is this context-parallel rank's share.

    Attributes:
        input_ids: [b, s].
        position_ids: [b, s].
        modality_ids: [b, s]: rows of the table of modalities (0 text, 1 vision, ...), -1 padding.
        vision_index: [b, s], for a position that a feature fills its row among the features of all tiles; -1 elsewhere.
        labels: [b, s].
        loss_mask: [b, s] float.
        pixel_values: [tiles, 3, H, W]; None but on the first pipeline stage.
        packed_seq_params: Where the sequences of a pack begin and end, on the host; None without packing.
        shares: What is logged as a share: name -> [part, whole].
        step_tokens: See `TrainingStep.tokens`; None without --calculate-per-token-loss.
        context_tokens: Loss tokens over the shares of all context-parallel ranks, [] float; None where there is one.
    """

    input_ids: Tensor
    position_ids: Tensor
    modality_ids: Tensor
    vision_index: Tensor
    labels: Tensor
    loss_mask: Tensor
    pixel_values: Tensor | None
    packed_seq_params: PackedSeqParams | None
    shares: dict[str, Tensor]
    step_tokens: Tensor | None
    context_tokens: Tensor | None


class DataWait:
    """Measures how long a rank waits for its loader."""

    def __init__(self) -> None:
        self._previous = time.monotonic()

    def next(self, iterator: Iterator[VisionLanguageBatch]) -> tuple[VisionLanguageBatch, tuple[float, float]]:
        """The next micro-batch, and the seconds that went into waiting for it of those since the previous one."""
        begin = time.monotonic()
        batch = next(iterator)
        previous, self._previous = self._previous, time.monotonic()
        return batch, (self._previous - begin, self._previous - previous)


class CountedSteps:
    """Reads a step's micro-batches together, so that its loss tokens are known before its first backward pass.

    For --calculate-per-token-loss, see `TrainingStep.tokens`. One all-reduce of one number per step; the samples and
    their order stay the same. The loader's state is saved between steps, when nothing is kept here; within a step, the
    tiles of all its micro-batches are in the host's memory.

    Args:
        iterator: The loader's.
        data_parallel: The replicas' group, without context parallelism: its ranks read the same samples.
    """

    def __init__(self, iterator: Iterator[VisionLanguageBatch], data_parallel: dist.ProcessGroup) -> None:
        self.iterator = iterator
        self.data_parallel = data_parallel
        self._step: deque[VisionLanguageBatch] = deque()

    def __iter__(self) -> CountedSteps:
        return self

    def __next__(self) -> VisionLanguageBatch:
        """The next micro-batch, which has its step's `step_tokens`."""
        if not self._step:
            batches = [next(self.iterator) for _ in range(get_num_microbatches())]
            tokens = _on_device(torch.stack([batch.loss_mask.sum() for batch in batches]).sum())
            dist.all_reduce(tokens, group=self.data_parallel)
            # Megatron divides by one token where there is none.
            tokens = tokens.clamp(min=1) / get_num_microbatches()
            self._step.extend(replace(batch, step_tokens=tokens) for batch in batches)
        return self._step.popleft()

    def save_state(self) -> Any:
        """The loader's state, for Megatron's checkpoint."""
        return self.iterator.save_state()  # type: ignore[attr-defined]


def prepare_batch(
    batch: VisionLanguageBatch,
    placeholders: Sequence[int],
    tokens_per_tile: int,
    with_images: bool,
    pg_collection: ProcessGroupCollection,
    data_wait: tuple[float, float] | None = None,
) -> ModelBatch:
    """Turns one micro-batch into what the model is given on this rank.

    Every rank of a data-parallel replica reads the same samples itself: no broadcast, so no rank can wait for another,
    and each pipeline stage knows the modalities. Only the first stage has images.

    Args:
        batch: The micro-batch, on the host.
        placeholders: Token ids of the placeholders, one for each kind of images, in the order of the modalities.
        tokens_per_tile: Vision tokens per tile.
        with_images: Whether this is the first pipeline stage.
        pg_collection: Process groups.
        data_wait: As `DataWait.next` gives it.

    Raises:
        ValueError: The tiles do not fill the placeholders exactly.
    """
    modality_ids = modality_ids_from_tokens(batch.input_ids, placeholders, batch.padding_mask)
    is_vision = modality_ids > TEXT
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
        "position_ids": _position_ids(batch),
        "modality_ids": modality_ids,
        "vision_index": torch.where(is_vision, order, -1),
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
    }
    cp = pg_collection.cp
    if batch.lengths is not None and cp.size() > 1:
        # Megatron's own cut of packs needs Transformer Engine; this is the same one.
        held = zigzag_positions(batch.lengths.tolist(), cp.size())[cp.rank()]
        sequences = {name: tensor[:, held] for name, tensor in sequences.items()}
    sequences = {name: _on_device(tensor) for name, tensor in sequences.items()}
    if batch.lengths is None and cp.size() > 1:
        sequences = get_batch_on_this_cp_rank(sequences, is_hybrid_cp=False, cp_group=cp)
    return ModelBatch(
        **sequences,
        pixel_values=_on_device(batch.pixel_values) if with_images else None,
        packed_seq_params=None if batch.lengths is None else _packed_seq_params(batch.lengths),
        shares=_shares(batch, data_wait),
        # Each of these ranks has read the whole sequences: nothing has to be reduced.
        step_tokens=batch.step_tokens,
        context_tokens=_on_device(batch.loss_mask.sum()) if cp.size() > 1 else None,
    )


def _on_device(tensor: Tensor) -> Tensor:
    """The tensor on this rank's device, by a copy that nothing waits for: such a copy starts from pinned memory.

    The loader's tensors are pinned already; what is made of them is not.
    """
    return tensor.contiguous().pin_memory().cuda(non_blocking=True)


def _shares(batch: VisionLanguageBatch, data_wait: tuple[float, float] | None) -> dict[str, Tensor]:
    """What is logged of a micro-batch: name -> [part, whole], which Megatron adds up before dividing."""
    shares: dict[str, tuple[float, float]] = {
        "text-only ratio": (batch.num_text_only, len(batch.__key__)),
        "fill": (int((~batch.padding_mask).sum()), batch.padding_mask.numel()),
    }
    if data_wait:
        shares["data wait"] = data_wait
    values = _on_device(torch.tensor(list(shares.values()), dtype=torch.float32))
    return dict(zip(shares, values, strict=True))


def _position_ids(batch: VisionLanguageBatch) -> Tensor:
    """Positions [b, s]: from 0 in each row, and in each sequence of a pack."""
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    if batch.lengths is None:
        return positions
    return positions - (batch.lengths.cumsum(0) - batch.lengths).repeat_interleave(batch.lengths)


def _packed_seq_params(lengths: Tensor) -> PackedSeqParams:
    """Sequences of these lengths, one behind the other without gaps, for all context-parallel ranks together.

    They stay on the host, where the local layers read them; the model copies them for those that want the device's.

    The longest length is that of a sequence: told the whole pack's, Megatron's rotary embedding would let positions run
    on through the pack. Its angles are relative, so that only long packs would show it, in bf16.
    """
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
