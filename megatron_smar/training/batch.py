# SPDX-License-Identifier: Apache-2.0
"""Converts a micro-batch of the loader into the model's inputs on this rank."""

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
from torch import Tensor

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.loss_weighting import LossWeighting, loss_weights
from megatron_smar.model.context_parallel import zigzag_positions
from megatron_smar.routing.modalities import TEXT, modality_ids_from_tokens


@dataclass(frozen=True)
class ModelBatch:
    """The inputs of the model and of the loss, on this rank's device; s is this context-parallel rank's share.

    Attributes:
        input_ids: Token ids [b, s].
        position_ids: Positions [b, s].
        modality_ids: Modality ids [b, s]: row in the table of modalities (0 text, 1 vision, ...); -1 for padding.
        sample_ids: Index of each position's sample in the micro-batch, [b, s]: its row, or its sequence in the pack.
        vision_index: For each position, the row of its vision feature among the features of all tiles, [b, s]; -1 at
            positions without one.
        labels: Target token ids [b, s].
        loss_mask: Weight of each position in the loss, [b, s] float.
        loss_positions: The positions whose loss counts, [n], as indices of [s, b], flattened.
        pixel_values: Tiles [tiles, 3, H, W]; None except on the first pipeline stage.
        packed_seq_params: Where the sequences of a pack begin and end, on the host; None without packing.
        shares: The ratios to log: name -> [part, total].
        step_tokens: See `TrainingStep.tokens`; None without --calculate-per-token-loss.
        context_tokens: Loss tokens of the micro-batch over all context-parallel ranks, [] float; None without context
            parallelism.
        samples: Number of samples of the micro-batch, padding after a pack's last sample included.
        loss_weights: Weight of each position with --loss-weighting, [b, s] float; None without.
        step_weight: See `VisionLanguageBatch.step_weight`.
    """

    input_ids: Tensor
    position_ids: Tensor
    modality_ids: Tensor
    sample_ids: Tensor
    vision_index: Tensor
    labels: Tensor
    loss_mask: Tensor
    loss_positions: Tensor
    pixel_values: Tensor | None
    packed_seq_params: PackedSeqParams | None
    shares: dict[str, Tensor]
    step_tokens: Tensor | None
    context_tokens: Tensor | None
    samples: int
    loss_weights: Tensor | None
    step_weight: Tensor | None

    def model_inputs(self) -> dict[str, Any]:
        """Returns the arguments of `VisionLanguageModel.forward`, without labels."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "modality_ids": self.modality_ids,
            "sample_ids": self.sample_ids,
            "pixel_values": self.pixel_values,
            "vision_index": self.vision_index,
            "packed_seq_params": self.packed_seq_params,
        }


class DataWait:
    """Measures how long a rank waits for its loader."""

    def __init__(self) -> None:
        self._previous = time.monotonic()

    def next(self, iterator: Iterator[VisionLanguageBatch]) -> tuple[VisionLanguageBatch, tuple[float, float]]:
        """Returns the next micro-batch, and (seconds spent waiting for it, seconds since the previous micro-batch)."""
        begin = time.monotonic()
        batch = next(iterator)
        previous, self._previous = self._previous, time.monotonic()
        return batch, (self._previous - begin, self._previous - previous)


class CountedSteps:
    """Reads all micro-batches of a step together, so that its loss tokens are known before the first backward pass.

    Used with --calculate-per-token-loss, see `TrainingStep.tokens`. It costs one all-reduce of one number per step; the
    samples and their order stay the same. The loader's state is saved between steps, when nothing is buffered here;
    within a step, the tiles of all its micro-batches are in the host's memory.

    Args:
        iterator: The loader's iterator.
        data_parallel: Process group of the replicas, without context parallelism: context-parallel ranks read the same
            samples.
    """

    def __init__(self, iterator: Iterator[VisionLanguageBatch], data_parallel: dist.ProcessGroup) -> None:
        self.iterator = iterator
        self.data_parallel = data_parallel
        self._step: deque[VisionLanguageBatch] = deque()

    def __iter__(self) -> CountedSteps:
        return self

    def __next__(self) -> VisionLanguageBatch:
        """Returns the next micro-batch, with the numbers of its step set: `step_tokens`, or those of a subclass."""
        if not self._step:
            self._step.extend(self._counted([next(self.iterator) for _ in range(get_num_microbatches())]))
        return self._step.popleft()

    def _counted(self, batches: list[VisionLanguageBatch]) -> list[VisionLanguageBatch]:
        """Returns this replica's micro-batches of a step, with the step's numbers set."""
        # A step without loss tokens counts as one token, as in Megatron.
        tokens = self._mean_over_micro_batches([batch.loss_mask for batch in batches], at_least=1)
        return [replace(batch, step_tokens=tokens) for batch in batches]

    def _mean_over_micro_batches(self, values: list[Tensor], at_least: float = 0) -> Tensor:
        """Returns the sum of all values of the step, over all replicas, divided by the number of micro-batches."""
        total = on_device(torch.stack([value.sum() for value in values]).sum())
        dist.all_reduce(total, group=self.data_parallel)
        return total.clamp(min=at_least) / len(values)

    def save_state(self) -> Any:
        """Returns the loader's state, for Megatron's checkpoint."""
        return self.iterator.save_state()  # type: ignore[attr-defined]


class WeightedSteps(CountedSteps):
    """Sets the loss weights of a step's micro-batches, and the sum of the step's, before the first backward pass.

    Used with --loss-weighting. The weights are computed from complete sequences, which every context-parallel rank has
    read, so a sample's loss tokens need no reduction.

    Args:
        iterator: As for `CountedSteps`.
        data_parallel: As for `CountedSteps`.
        weighting: Which weights.
    """

    def __init__(
        self, iterator: Iterator[VisionLanguageBatch], data_parallel: dist.ProcessGroup, weighting: LossWeighting
    ) -> None:
        super().__init__(iterator, data_parallel)
        self.weighting = weighting

    def _counted(self, batches: list[VisionLanguageBatch]) -> list[VisionLanguageBatch]:
        weights = [loss_weights(batch.loss_mask, batch.lengths, self.weighting) for batch in batches]
        # In float64: the rounding differences between layouts then vanish, in practice, in the float32 result.
        step = self._mean_over_micro_batches([weight.double() for weight in weights]).float()
        return [
            replace(batch, loss_weights=weight, step_weight=step)
            for batch, weight in zip(batches, weights, strict=True)
        ]


def read_ahead(
    iterator: Iterator[VisionLanguageBatch],
    data_parallel: dist.ProcessGroup,
    per_token: bool,
    weighting: LossWeighting | None,
) -> Iterator[VisionLanguageBatch]:
    """Returns the iterator, wrapped if the loss needs numbers of a whole step.

    Args:
        iterator: As for `CountedSteps`.
        data_parallel: As for `CountedSteps`.
        per_token: Whether --calculate-per-token-loss is given.
        weighting: --loss-weighting.
    """
    if weighting is not None:
        return WeightedSteps(iterator, data_parallel, weighting)
    return CountedSteps(iterator, data_parallel) if per_token else iterator


def prepare_batch(
    batch: VisionLanguageBatch,
    placeholders: Sequence[int],
    tokens_per_tile: int,
    with_images: bool,
    pg_collection: ProcessGroupCollection,
    data_wait: tuple[float, float] | None = None,
) -> ModelBatch:
    """Converts one micro-batch into the model's inputs on this rank.

    Every rank of a data-parallel replica reads the same samples itself. There is no broadcast, so no rank waits for
    another, and each pipeline stage knows the modalities. Only the first stage has images.

    Args:
        batch: The micro-batch, on the host.
        placeholders: Token ids of the placeholders, one for each image modality, in the order of the modalities.
        tokens_per_tile: Vision tokens per tile.
        with_images: Whether this is the first pipeline stage.
        pg_collection: Megatron's process groups.
        data_wait: Waiting time and total time, as returned by `DataWait.next`; None to log no share of them.

    Raises:
        ValueError: The tiles do not fill the placeholders exactly.
    """
    modality_ids = modality_ids_from_tokens(batch.input_ids, placeholders, batch.padding_mask)
    is_vision = modality_ids > TEXT
    if with_images:
        # Counted before the batch is copied to the device, where reading the count would need a synchronization.
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
        "sample_ids": _sample_ids(batch),
        "vision_index": torch.where(is_vision, order, -1),
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
    }
    if batch.loss_weights is not None:
        sequences["loss_weights"] = batch.loss_weights
    cp = pg_collection.cp
    if cp.size() > 1:
        # Megatron's sharding gives the same shards, but needs a device, and Transformer Engine for packs.
        lengths = batch.input_ids.shape[1] if batch.lengths is None else batch.lengths.tolist()
        held = zigzag_positions(lengths, cp.size())[cp.rank()]
        sequences = {name: tensor[:, held] for name, tensor in sequences.items()}
    # Found before the copy to the device, where their number would need a synchronization.
    loss_positions = sequences["loss_mask"].t().flatten().nonzero().squeeze(1)
    sequences = {name: on_device(tensor) for name, tensor in sequences.items()}
    return ModelBatch(
        loss_weights=sequences.pop("loss_weights", None),
        **sequences,
        loss_positions=on_device(loss_positions),
        pixel_values=_tiles_on_device(batch.pixel_values) if with_images else None,
        packed_seq_params=None if batch.lengths is None else _packed_seq_params(batch.lengths),
        shares=_shares(batch, data_wait),
        step_tokens=batch.step_tokens,
        # Each context-parallel rank has read the full sequences, so no reduction is needed.
        context_tokens=on_device(batch.loss_mask.sum()) if cp.size() > 1 else None,
        samples=batch.input_ids.shape[0] if batch.lengths is None else len(batch.lengths),
        step_weight=batch.step_weight,
    )


def _tiles_on_device(tiles: Tensor) -> Tensor:
    """Copies tiles [n, 3, H, W] to the device, which separates their colors in memory faster than the host would."""
    return tiles.pin_memory().cuda(non_blocking=True).contiguous()


def on_device(tensor: Tensor) -> Tensor:
    """Copies a tensor to this rank's device without blocking, for which the tensor must be in pinned memory.

    The loader's tensors are already pinned; tensors computed from them are not.
    """
    return tensor.contiguous().pin_memory().cuda(non_blocking=True)


def _shares(batch: VisionLanguageBatch, data_wait: tuple[float, float] | None) -> dict[str, Tensor]:
    """Returns the shares logged for a micro-batch: name -> [part, total]; Megatron adds up both, then divides."""
    shares: dict[str, tuple[float, float]] = {
        "text-only ratio": (batch.num_text_only, len(batch.__key__)),
        "fill": (int((~batch.padding_mask).sum()), batch.padding_mask.numel()),
    }
    if data_wait:
        shares["data wait"] = data_wait
    values = on_device(torch.tensor(list(shares.values()), dtype=torch.float32))
    return dict(zip(shares, values, strict=True))


def _position_ids(batch: VisionLanguageBatch) -> Tensor:
    """Returns positions [b, s], counted from 0 in each row, or in each sequence of a pack."""
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    if batch.lengths is None:
        return positions
    return positions - (batch.lengths.cumsum(0) - batch.lengths).repeat_interleave(batch.lengths)


def _sample_ids(batch: VisionLanguageBatch) -> Tensor:
    """Returns the index of each position's sample, [b, s]: its row, or its sequence in the pack."""
    if batch.lengths is None:
        return torch.arange(batch.input_ids.shape[0]).unsqueeze(1).expand_as(batch.input_ids)
    return torch.arange(len(batch.lengths)).repeat_interleave(batch.lengths).unsqueeze(0)


def _packed_seq_params(lengths: Tensor) -> PackedSeqParams:
    """Returns the parameters of a pack of sequences of these lengths, without gaps, before context-parallel sharding.

    The tensors stay on the host, where the local layers read them; the model copies them to the device for layers that
    need them there.

    The maximum length must be that of the longest sequence: if it were the pack's length, Megatron's rotary embedding
    would not restart positions at each sequence. Attention scores depend on relative positions only, so the error would
    be visible only in long packs in bf16.
    """
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
