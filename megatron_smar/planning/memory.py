# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank: weights, gradients and optimizer, exactly as Megatron's buffers lay them out, and activations.

Megatron concatenates the trained parameters of each chunk of a stage, dense ones and experts apart, in buffers in
reverse order. With the distributed optimizer every parameter begins at a multiple of 64 elements, a buffer (or each of
its buckets, where gradients are reduced while the backward pass runs) is padded for its replicas, the weights get such
a buffer as well, and each replica has the optimizer's state of its share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megatron_smar.planning.activations import FLOAT32, Activations, activations
from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.operations import Recomputation
from megatron_smar.planning.shape import ModelShape, Parameter, padded

ALIGNMENT, BUCKET_DIVISOR = 64, 128  # megatron.core.optimizer.param_layout
BUCKET_SIZE, BUCKET_PER_REPLICA = 40_000_000, 1_000_000  # DistributedDataParallel's default: the larger of the two
BFLOAT16 = 2
END = ("language_model.output_layer", "language_model.decoder.final_layernorm")  # parameters of the last stage
EMBEDDING = "word_embeddings.weight"  # the last stage has a copy of it, where the output layer shares it
MOMENTS = 8  # Adam's two, in float32
COMMUNICATION = 2 * 1024**3  # NCCL's buffers and the CUDA context: an assumption, not part of the allocator's peak


@dataclass(frozen=True)
class Place:
    """A rank's position in the layout.

    Attributes:
        stage: Pipeline stage.
        replica: Index among the ranks with the same dense weights.
        expert_replica: Index among the ranks with the same experts.
    """

    stage: int = 0
    replica: int = 0
    expert_replica: int = 0


FIRST = Place()


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank by kind.

    Attributes:
        weights: Parameters, in their data type.
        gradients: Buffers in which gradients accumulate.
        optimizer: Adam's moments and the float32 copies of bf16 weights.
        activations: What the backward pass needs of the forward pass, by part, and the largest temporary memory.
        host: The optimizer's state in the host's memory, where it is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: Activations
    host: int = 0

    @property
    def static(self) -> int:
        """Without activations."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """What the allocator holds at most in forward and backward passes."""
        return self.static + self.activations.total

    @property
    def device(self) -> int:
        """What a device must have: the peak and communication buffers."""
        return self.peak + COMMUNICATION

    def by_part(self) -> dict[str, int]:
        """Returns the bytes of every part."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        return parts | {field.name: getattr(self.activations, field.name) for field in fields(self.activations)}


@dataclass(frozen=True)
class Buffer:
    """A buffer of gradients, and with the distributed optimizer of weights.

    Attributes:
        experts: Whether its parameters are experts'.
        float32: Whether its weights are float32.
        ranges: Where each parameter is: first element and end.
        buckets: Begin and end of each bucket.
    """

    experts: bool
    float32: bool
    ranges: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Elements with padding."""
        return self.buckets[-1][1]

    def share(self, replicas: int, index: int) -> int:
        """Returns the elements of parameters, without padding, of which a replica has the optimizer's state."""
        owned = 0
        for begin, end in self.buckets:
            size = (end - begin) // replicas
            first = begin + index * size
            owned += sum(
                max(0, min(last, first + size) - max(start, first)) for start, last in self._within(begin, end)
            )
        return owned

    def _within(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        return (place for place in self.ranges if begin <= place[0] < end)


def held_parameters(shape: ModelShape, layout: Layout, stage: int) -> list[list[tuple[Parameter, int]]]:
    """Returns the parameters of a rank with the size of its shard, for each chunk of its stage.

    Pictures and embeddings are in the first chunk of the first stage, the output layer in the last of the last.
    """
    return _held(shape, without_batch(layout), stage)


@functools.lru_cache(maxsize=4096)
def _held(shape: ModelShape, layout: Layout, stage: int) -> list[list[tuple[Parameter, int]]]:
    chunks = []
    local_experts = max(1, shape.decoder.experts // layout.expert)
    for number, layers in enumerate(layout.layers_of(shape, stage)):
        first = stage == 0 and number == 0
        last = stage == layout.pipeline - 1 and number == layout.chunks - 1
        held = []
        for parameter in shape.parameters:
            if parameter.layer is None:
                is_end = parameter.name.startswith(END)
                here = last if is_end else first or (last and shape.is_tied and parameter.name.endswith(EMBEDDING))
            else:
                here = parameter.layer in layers and (parameter.expert or 0) < local_experts
            if here:
                held.append((parameter, _shard(shape, layout, parameter)))
        chunks.append(held)
    return chunks


def _shard(shape: ModelShape, layout: Layout, parameter: Parameter) -> int:
    """Returns the elements of a parameter on a rank that holds it."""
    size = parameter.size
    if parameter.part == "embeddings":
        size = size // shape.decoder.vocabulary * shape.decoder.padded_vocabulary(layout.tensor)
    ranks = layout.expert_tensor if parameter.expert is not None else layout.tensor
    return size // ranks if parameter.tensor_parallel and not is_whole(layout, parameter) else size


def is_whole(layout: Layout, parameter: Parameter) -> bool:
    """Returns whether a projection to latents is one that Transformer Engine's layers do not shard."""
    return layout.fused and "_down_proj." in parameter.name


def buffers(shape: ModelShape, layout: Layout, stage: int = 0) -> list[Buffer]:
    """Returns the buffers of the trained parameters of a rank of a pipeline stage."""
    return _buffers(shape, without_batch(layout), stage)


def without_batch(layout: Layout) -> Layout:
    """Returns the layout without what weights and buffers do not depend on, as a key."""
    return replace(layout, micro_batch=1, recomputation=Recomputation(), offload=False, flex=False)


@functools.lru_cache(maxsize=4096)
def _buffers(shape: ModelShape, layout: Layout, stage: int) -> list[Buffer]:
    found = []
    for number, held in enumerate(held_parameters(shape, layout, stage)):
        groups: dict[tuple[bool, bool], list[int]] = {}
        for parameter, size in held:
            if parameter.part in shape.trained:
                key = (parameter.expert is not None, parameter.float32 or not layout.bf16)
                groups.setdefault(key, []).append(size)
        bucketed = layout.overlap and stage == 0 and number == 0
        for (experts, float32), sizes in groups.items():
            found.append(_buffer(layout, experts, float32, sizes, bucketed))
    return found


def _buffer(layout: Layout, experts: bool, float32: bool, sizes: list[int], bucketed: bool) -> Buffer:
    replicas = layout.expert_replicas if experts else layout.replicas
    most = max(BUCKET_SIZE, BUCKET_PER_REPLICA * layout.replicas) if bucketed else math.inf
    align, divisor = (ALIGNMENT, math.lcm(replicas, BUCKET_DIVISOR)) if layout.distributed_optimizer else (1, 1)
    ranges, buckets, begin, end = [], [], 0, 0
    for size in reversed(sizes):
        start = padded(end, align)
        end = start + size
        ranges.append((start, end))
        if end - begin >= most:
            end = padded(end, divisor)
            buckets.append((begin, end))
            begin = end
    if end > begin:
        buckets.append((begin, padded(end, divisor)))
    return Buffer(experts, float32, tuple(ranges), tuple(buckets))


def owned(layout: Layout, place: Place, buffer: Buffer) -> int:
    """Returns the elements of a buffer of which a rank has the optimizer's state."""
    if not layout.distributed_optimizer:
        return buffer.share(1, 0)
    if buffer.experts:
        return buffer.share(layout.expert_replicas, place.expert_replica)
    return buffer.share(layout.replicas, place.replica)


def memory(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    place: Place = FIRST,
    imbalance: float = 1.0,
) -> Memory:
    """Returns the memory of a rank.

    Args:
        shape: The model, with its parameters.
        layout: The parallel layout.
        batch: What a step trains on.
        place: Which rank.
        imbalance: Tokens of the rank with most, relative to an even share of the tokens to the experts.
    """
    weights, gradients, optimizer = _static(shape, without_batch(layout), place)
    # On the host the state has a pinned copy of the gradients next to it.
    host = optimizer // (MOMENTS + FLOAT32) * (MOMENTS + 2 * FLOAT32) if layout.offload else 0
    kept = activations(shape, layout, batch, place.stage, imbalance)
    return Memory(weights, gradients, 0 if layout.offload else optimizer, kept, host)


@functools.lru_cache(maxsize=4096)
def _static(shape: ModelShape, layout: Layout, place: Place) -> tuple[int, int, int]:
    """Returns the bytes of weights, gradients and the optimizer's state."""
    weights = gradients = optimizer = 0
    held = [item for chunk in held_parameters(shape, layout, place.stage) for item in chunk]
    for parameter, size in held:
        if not layout.distributed_optimizer or parameter.part not in shape.trained:
            weights += size * (BFLOAT16 if layout.bf16 and not parameter.float32 else FLOAT32)
    for buffer in buffers(shape, layout, place.stage):
        element = FLOAT32 if buffer.float32 else BFLOAT16
        weights += buffer.elements * element if layout.distributed_optimizer else 0
        gradients += buffer.elements * FLOAT32
        optimizer += owned(layout, place, buffer) * (MOMENTS + (0 if buffer.float32 else FLOAT32))
    return weights, gradients, optimizer


def checkpoint_bytes(shape: ModelShape) -> int:
    """Returns the size of a checkpoint: bf16 weights, and of what is trained float32 weights and two moments."""
    trained = sum(parameter.size for parameter in shape.parameters if parameter.part in shape.trained)
    return BFLOAT16 * shape.size + (MOMENTS + FLOAT32) * trained


def saving_bytes(shape: ModelShape, layout: Layout, stage: int = 0) -> int:
    """Returns what a rank holds in the host's memory while it saves or resumes: the state of all that it trains."""
    held = [item for chunk in held_parameters(shape, layout, stage) for item in chunk]
    return (MOMENTS + FLOAT32) * sum(size for parameter, size in held if parameter.part in shape.trained)
