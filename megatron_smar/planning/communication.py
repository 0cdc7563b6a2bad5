# SPDX-License-Identifier: Apache-2.0
"""Collectives of a training step on one rank: calls and bytes, by process group.

Bytes are those of the tensor that a rank holds after the operation (its own, for all-reduce and sends): the whole of an
all-gather, the shard of a reduce-scatter. `benchmarks/plan_accuracy.py` compares them with the collectives that torch
dispatches. How many tokens a rank's experts receive is decided by the routing; a plan takes an even share.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_smar.planning.activations import FLOAT32, INT64
from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.memory import BFLOAT16, FIRST, Place, buffers, held_parameters, is_whole, without_batch
from megatron_smar.planning.shape import ModelShape
from megatron_smar.planning.statistics import reduced_floats

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv"]
Group = Literal[
    "data", "expert data", "tensor", "context", "tensor and context", "tokens", "expert", "expert tensor",
    "expert and tensor", "pipeline", "model", "world",
]  # fmt: skip
# What the trainer agrees on in every step: finite losses, gradient norm, whether to stop.
LOGGED_LOSSES, LOGGED_BYTES = 4, 2 * FLOAT32


@dataclass(frozen=True)
class Collective:
    """All collectives of a kind in a step, on one rank.

    Attributes:
        purpose: What they are for.
        group: The process group.
        operation: The operation.
        calls: Number of calls.
        bytes: Bytes of all calls.
        per_micro_batch: Whether they recur in every micro-batch, rather than once per step.
    """

    purpose: str
    group: Group
    operation: Operation
    calls: int
    bytes: int
    per_micro_batch: bool = True


def ranks_of(layout: Layout, group: Group) -> int:
    """Returns the number of ranks of a process group."""
    sizes: dict[Group, int] = {
        "data": layout.replicas,
        "expert data": layout.expert_replicas,
        "tensor": layout.tensor,
        "context": layout.context,
        "tensor and context": layout.tensor * layout.context,
        "tokens": layout.gpus // layout.pipeline,
        "expert": layout.expert,
        "expert tensor": layout.expert_tensor,
        "expert and tensor": layout.expert * layout.expert_tensor,
        "pipeline": layout.pipeline,
        "model": layout.tensor * layout.pipeline,
        "world": layout.gpus,
    }
    return sizes[group]


def communication(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    place: Place = FIRST,
    received: float | None = None,
    strategy: str = "smar",
) -> list[Collective]:
    """Returns the collectives of a step on a rank.

    Args:
        shape: The model, with its parameters.
        layout: The parallel layout.
        batch: What a step trains on.
        place: Which rank.
        received: Copies of tokens that the rank's experts compute per step, over its layers and micro-batches; None for
            an even share.
        strategy: --modality-routing; with `none` no routing statistics are reduced.
    """
    step = _Step(shape, layout, batch, place, received, strategy)
    found: Counter[tuple[str, Group, Operation, bool]] = Counter()
    calls: Counter[tuple[str, Group, Operation, bool]] = Counter()
    for one in step.collectives():
        key = (one.purpose, one.group, one.operation, one.per_micro_batch)
        calls[key] += one.calls
        found[key] += one.bytes
    return [Collective(*key[:3], calls[key], found[key], key[3]) for key in calls]


@functools.lru_cache(maxsize=4096)
def _seen_in_shares(shape: ModelShape, layout: Layout, stage: int) -> int:
    held = [parameter for chunk in held_parameters(shape, layout, stage) for parameter, _ in chunk]
    return sum(
        parameter.size
        for parameter in held
        if parameter.part in shape.trained
        and (is_whole(layout, parameter) or (parameter.part in ("norms", "router") and not parameter.tensor_parallel))
    )


def shares_of_sequence(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Returns the elements of parameters of which each tensor-parallel rank's gradient is from its share of tokens."""
    return _seen_in_shares(shape, without_batch(layout), stage) if layout.tensor > 1 else 0


class _Step:
    """The collectives of a step, part by part."""

    def __init__(
        self, shape: ModelShape, layout: Layout, batch: Batch, place: Place, received: float | None, strategy: str
    ) -> None:
        self.shape, self.layout, self.batch, self.place, self.strategy = shape, layout, batch, place, strategy
        self.element = BFLOAT16 if layout.bf16 else FLOAT32
        self.micro_batches = layout.micro_batches(batch)
        self.tokens = batch.sequence // layout.context * layout.micro_batch
        self.predicted = round(self.tokens * batch.predicted)
        self.hidden_bytes = self.tokens * shape.decoder.hidden * self.element
        self.layers = [layer for chunk in layout.layers_of(shape, place.stage) for layer in chunk]
        self.moe_layers = sum(shape.decoder.moe_layers[layer] for layer in self.layers)
        self.first, self.last = place.stage == 0, place.stage == layout.pipeline - 1
        # Recomputed layers run their forward pass twice.
        self.forwards = 2 if layout.recomputation.granularity == "full" else 1
        self.copies = self.tokens // layout.tensor * shape.decoder.top_k
        even = self.copies * layout.expert_tensor * self.moe_layers * self.micro_batches
        self.received = even if received is None else received

    def collectives(self) -> Iterator[Collective]:
        """Yields all collectives; several of one kind may follow each other."""
        yield from self._gradients()
        yield from self._tensor_parallel()
        yield from self._context_parallel()
        yield from self._experts()
        yield from self._pipeline()
        yield from self._control()

    def _gradients(self) -> Iterator[Collective]:
        layout = self.layout
        for buffer in buffers(self.shape, layout, self.place.stage):
            group: Group = "expert data" if buffer.experts else "data"
            size, calls = buffer.elements, len(buffer.buckets)
            if not layout.distributed_optimizer:
                yield Collective("gradients", group, "all_reduce", calls, size * FLOAT32, False)
                continue
            share = size // ranks_of(layout, group) * FLOAT32
            yield Collective("gradients", group, "reduce_scatter", calls, share, False)
            weights = size * (FLOAT32 if buffer.float32 else BFLOAT16)
            yield Collective("weights", group, "all_gather", calls, weights, False)
        size = shares_of_sequence(self.shape, layout, self.place.stage)
        if size:
            yield Collective("gradients", "tensor", "all_reduce", 1, size * FLOAT32, False)

    def _tensor_parallel(self) -> Iterator[Collective]:
        layout, m, size = self.layout, self.micro_batches, self.hidden_bytes
        if self.first and self.batch.tiles and layout.tensor * layout.context > 1:
            vision, ranks = self.shape.vision, layout.tensor * layout.context
            tiles = -(-int(self.batch.tiles * layout.micro_batch) // ranks) * ranks
            features = tiles * vision.tokens * self.shape.connector_input * self.element
            yield Collective("vision features", "tensor and context", "all_gather", m, m * features)
        if layout.tensor > 1:
            yield from self._sequence_parallel()
            yield from self._exchanged(self.shape.decoder.hidden, self.first + self.last, 0)
            if self.first:
                yield Collective("embeddings", "tensor", "all_reduce", m, m * size)
            if self.last:  # positions with logits are chosen from the whole sequence, and their gradients summed
                chosen = self.predicted * self.shape.decoder.hidden * self.element
                yield Collective("loss", "tensor", "all_reduce", m, m * chosen)
        if self.last:  # largest logit, logit of the label, sum of exponentials
            yield Collective("loss", "tensor", "all_reduce", 3 * m, 3 * m * self.predicted * FLOAT32)

    def _sequence_parallel(self) -> Iterator[Collective]:
        """Yields what the linear layers exchange.

        A column-parallel layer gathers its input, and again for the gradient of its weights; that of its input is
        reduced and scattered. A row-parallel layer reduces and scatters its output, whose gradient is gathered.
        """
        decoder, layers, again = self.shape.decoder, len(self.layers), self.forwards
        dense, shared = layers - self.moe_layers, self.moe_layers if decoder.shared_ffn else 0
        columns = [(decoder.hidden, "dense", dense), (decoder.hidden, "experts", shared)]
        columns += [(width, "attention", layers) for width in self._attention_inputs()]
        for width, part, number in columns:
            yield from self._exchanged(width, number * (again + (part in self.shape.trained)), number)
        rows = layers + dense + shared
        yield from self._exchanged(decoder.hidden, rows, rows * again)
        if decoder.latent_attention:
            yield from self._exchanged(decoder.latent_attention.rotary, layers * again, layers)
            if not self.layout.fused:  # latents are sharded by numbers, then by tokens
                for width in (decoder.latent_attention.compressed, decoder.latent_attention.query_rank):
                    yield from self._exchanged(width, layers * (again + 1), 0)

    def _attention_inputs(self) -> list[int]:
        """Returns the sizes of the inputs of an attention's column-parallel layers."""
        hidden, latent = self.shape.decoder.hidden, self.shape.decoder.latent_attention
        if latent is None:
            return [hidden]
        up = [latent.rank, latent.query_rank or hidden]
        if self.layout.fused:
            return up
        return [hidden, *up, hidden] if latent.query_rank else [hidden, *up]

    def _exchanged(self, width: int, gathers: int, scatters: int) -> Iterator[Collective]:
        m, size = self.micro_batches, self.tokens * width * self.element
        shard = size // self.layout.tensor
        if width and gathers:
            yield Collective("sequence parallelism", "tensor", "all_gather", m * gathers, m * gathers * size)
        if width and scatters:
            yield Collective("sequence parallelism", "tensor", "reduce_scatter", m * scatters, m * scatters * shard)

    def _context_parallel(self) -> Iterator[Collective]:
        layout = self.layout
        if layout.context == 1:
            return
        calls, decoder = len(self.layers) * self.micro_batches, self.shape.decoder
        for width in (decoder.key_width, decoder.value_width):
            own = self.tokens * width // layout.tensor * self.element
            gathers = calls * self.forwards
            yield Collective("keys and values", "context", "all_gather", gathers, gathers * own * layout.context)
            yield Collective("keys and values", "context", "reduce_scatter", calls, calls * own)

    def _experts(self) -> Iterator[Collective]:
        layout, decoder = self.layout, self.shape.decoder
        calls, again = self.moe_layers * self.micro_batches, self.forwards
        if not calls:
            return
        width = (decoder.latent or decoder.hidden) * self.element
        own, own_tokens = self.copies * calls, int(self.received) // layout.expert_tensor
        if layout.expert > 1:
            there = (own_tokens * again + own) * (width + FLOAT32)
            back = (own * again + own_tokens) * width
            yield Collective("dispatch", "expert", "all_to_all", calls * (3 * again + 3), there + back)
        if layout.expert_tensor > 1:
            gathered = int(self.received) * (again * (width + FLOAT32) + width)
            scattered = own_tokens * (again * width + width + FLOAT32)
            yield Collective("dispatch", "expert tensor", "all_gather", calls * (2 * again + 1), gathered)
            yield Collective("dispatch", "expert tensor", "reduce_scatter", calls * (again + 2), scattered)
        if layout.expert * layout.expert_tensor > 1:
            counts = layout.expert * layout.expert_tensor * decoder.experts * INT64
            yield Collective("counts", "expert and tensor", "all_gather", calls * again, calls * again * counts)
        if self.strategy != "none" and ranks_of(layout, "tokens") > 1:
            floats = reduced_floats(self.shape.modalities, decoder.experts)
            yield Collective("routing statistics", "tokens", "all_reduce", calls, calls * floats * FLOAT32)

    def _pipeline(self) -> Iterator[Collective]:
        layout, m = self.layout, self.micro_batches
        if layout.pipeline == 1:
            return
        # Forward passes go to the next chunk, gradients to the previous one; the two ends have no neighbor.
        calls = m * (2 * layout.chunks - (self.first or self.last))
        size = self.hidden_bytes // layout.tensor
        for operation in ("send", "recv"):
            yield Collective("pipeline", "pipeline", operation, calls, calls * size)

    def _control(self) -> Iterator[Collective]:
        if self.last:
            yield Collective("logged losses", "data", "all_reduce", LOGGED_LOSSES, LOGGED_LOSSES * LOGGED_BYTES, False)
        norms = 2 if self.layout.distributed_optimizer else 3
        yield Collective("gradient norm", "model", "all_reduce", norms, norms * FLOAT32, False)
        yield Collective("gradient norm", "world", "all_reduce", 1, FLOAT32, False)
        yield Collective("agreement", "world", "all_reduce", 2, 3 * FLOAT32, False)
