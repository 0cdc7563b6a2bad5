# SPDX-License-Identifier: Apache-2.0
"""Time of a training step: operations, memory traffic, collectives, pipeline bubbles, and what overlaps.

Every part is bytes or operations divided by a data sheet's speed, of which training reaches `Cluster.efficiency`.
Parts of a micro-batch add up: within a layer Megatron overlaps little by default. Gradients are reduced during the last
micro-batch's backward pass and weights gathered during the first forward pass, so only what takes longer is exposed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

from megatron_smar.planning.activations import attention_bytes, feed_forward_bytes, local_sizes
from megatron_smar.planning.cluster import Cluster
from megatron_smar.planning.communication import Collective, communication, ranks_of
from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.memory import Memory, Place
from megatron_smar.planning.operations import Operations, Recomputation, Work, operations
from megatron_smar.planning.shape import ModelShape

# Every kept activation is written and read in the forward pass, read in the backward pass, and its gradient is written.
TRAFFIC = 4
BACKWARD = 2 / 3  # share of a micro-batch's computation


@dataclass(frozen=True)
class Duration:
    """Seconds of a step by part, on the slowest pipeline stage.

    Attributes:
        decoder: Matrix products of the language model.
        vision: Matrix products of encoder and connector.
        memory: Everything that is not a matrix product, by its memory traffic.
        experts: All-to-all and expert tensor parallelism.
        tensor: Sequence parallelism.
        context: Keys and values.
        pipeline: Sends between stages.
        bubble: Stages that wait, because the pipeline fills and drains.
        data: Gradients and weights, as far as they do not overlap.
        optimizer: The optimizer's step.
    """

    decoder: float
    vision: float
    memory: float
    experts: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def by_part(self) -> dict[str, float]:
        """Returns the seconds of every part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def work_of_step(shape: ModelShape, batch: Batch) -> Work:
    """Returns what a step computes: real tokens, causal attention within samples, even routing."""
    decoder = shape.decoder
    tokens = batch.rows * batch.sequence * batch.filled
    length = batch.sequence * batch.filled / batch.samples
    return Work(
        samples=batch.rows * batch.samples,
        tokens=tokens,
        pairs=tokens * (length + 1) / 2,
        routed=tokens * decoder.top_k * sum(decoder.moe_layers),
        tiles=batch.rows * batch.tiles,
        predicted=batch.rows * batch.sequence * batch.predicted,
    )


def timed_batch(layout: Layout, batch: Batch) -> Batch:
    """Returns the batch with the padding that a layout executes.

    Pipeline stages exchange rows of one length, and rows of a micro-batch have the length of the longest, which is
    taken as the full one.
    """
    if layout.pipeline > 1 or layout.micro_batch > 1:
        return replace(batch, filled=1.0)
    return replace(
        batch,
        sequence=max(1, round(batch.sequence * batch.filled)),
        filled=1.0,
        predicted=min(1.0, batch.predicted / batch.filled),
    )


def duration(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    cluster: Cluster,
    memory: Memory,
    imbalance: float = 1.0,
    strategy: str = "smar",
) -> Duration:
    """Returns the time of a step.

    Args:
        shape: The model, with its parameters.
        layout: The parallel layout.
        batch: What a step trains on.
        cluster: The GPUs.
        memory: Memory of the rank, whose optimizer state the step reads and writes.
        imbalance: Tokens of the rank whose experts have most, relative to an even share.
        strategy: --modality-routing.
    """
    batch = timed_batch(layout, batch)
    stages = [_stage(shape, layout, batch, cluster, stage, imbalance, strategy) for stage in _ends(layout)]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    m = layout.micro_batches(batch)
    per_micro_batch = sum(slowest.values()) / m
    computed = (slowest["decoder"] + slowest["vision"]) / m
    bubble = (layout.pipeline - 1) / layout.chunks * per_micro_batch
    once = [one for one in communication(shape, layout, batch, strategy=strategy) if not one.per_micro_batch]
    reduced = sum(seconds(one, layout, cluster) for one in once if one.purpose == "gradients")
    gathered = sum(seconds(one, layout, cluster) for one in once if one.purpose == "weights")
    if layout.overlap:
        reduced = max(0.0, reduced - BACKWARD * computed)
        gathered = max(0.0, gathered - (1 - BACKWARD) * computed)
    touched = 2 * (memory.optimizer or memory.host) + memory.gradients + memory.weights
    speed = HOST_GBS if layout.offload else cluster.memory_gbs * cluster.efficiency
    return Duration(**slowest, bubble=bubble, data=reduced + gathered, optimizer=touched / (speed * 1e9))


HOST_GBS = 20.0  # of a GPU's share of the host's memory, for an optimizer there


def _ends(layout: Layout) -> list[int]:
    """Returns the stages that can be the slowest: the first has pictures, the last the output layer, others neither."""
    return sorted({0, layout.pipeline // 2, layout.pipeline - 1})


def _stage(
    shape: ModelShape, layout: Layout, batch: Batch, cluster: Cluster, stage: int, imbalance: float, strategy: str
) -> dict[str, float]:
    """Returns the seconds of all micro-batches on a stage, by part of `Duration`."""
    decoder, vision = _stage_operations(shape, layout, batch, stage, imbalance)
    speed, traffic = cluster.tflops * 1e12 * cluster.efficiency, cluster.memory_gbs * 1e9 * cluster.efficiency
    local = local_sizes(shape, layout, batch, imbalance)
    m = layout.micro_batches(batch)
    layers = [layer for chunk in layout.layers_of(shape, stage) for layer in chunk]
    plain = replace(layout, recomputation=Recomputation())
    kept = sum(
        attention_bytes(shape.decoder, plain, local, "fused")
        + feed_forward_bytes(shape.decoder, plain, local, "fused", shape.decoder.moe_layers[layer])
        for layer in layers
    )
    passes = TRAFFIC + (2 if layout.recomputation.granularity == "full" else 0)
    parts = {
        "decoder": decoder / speed,
        "vision": vision / speed,
        "memory": m * passes * kept / traffic,
        "experts": 0.0,
        "tensor": 0.0,
        "context": 0.0,
        "pipeline": 0.0,
    }
    for one in communication(shape, layout, batch, Place(stage), strategy=strategy):
        if one.per_micro_batch:
            factor = imbalance if one.group in ("expert", "expert tensor") else 1.0
            parts[_part(one)] += factor * seconds(one, layout, cluster, shape.decoder.top_k)
    if layout.overlap_experts:
        parts["experts"] = max(0.0, parts["experts"] - parts["decoder"])
    if layout.chunks > 1:  # the interleaved schedule sends while it computes
        parts["pipeline"] = max(0.0, parts["pipeline"] - parts["decoder"])
    return parts


def _part(one: Collective) -> str:
    if one.purpose in ("dispatch", "counts", "routing statistics"):
        return "experts"
    return {"keys and values": "context", "pipeline": "pipeline"}.get(one.purpose, "tensor")


def _stage_operations(
    shape: ModelShape, layout: Layout, batch: Batch, stage: int, imbalance: float
) -> tuple[float, float]:
    """Returns the operations of a rank in a step: of its part of the decoder, and of the vision encoder."""
    decoder = shape.decoder
    share = len(layout.layers_of(shape, stage)[0]) * layout.chunks / len(decoder.moe_layers)
    work = work_of_step(shape, batch)
    recomputation = layout.recomputation
    whole = _operations(shape, replace(work, routed=work.routed * imbalance), recomputation)
    head = _head_operations(shape, work)
    of_layers = (whole.decoder - head) * share
    # A replica's ranks of a stage share everything but the pictures, which only the first stage has.
    ranks = layout.gpus // layout.pipeline
    last = stage == layout.pipeline - 1
    return (of_layers + (head if last else 0.0)) / ranks, whole.encoder / ranks if stage == 0 else 0.0


def _head_operations(shape: ModelShape, work: Work) -> float:
    trained = "embeddings" in shape.trained
    return 2 * work.predicted * shape.decoder.hidden * shape.decoder.vocabulary * (2 + trained)


def seconds(one: Collective, layout: Layout, cluster: Cluster, top_k: int = 1) -> float:
    """Returns the time of collectives: latency, and the bytes that leave the GPU over the links of the group.

    Args:
        one: The collectives.
        layout: The parallel layout.
        cluster: The GPUs.
        top_k: Experts per token, K.
    """
    ranks, stride = ranks_of(layout, one.group), _stride(layout, one)
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    moved = {
        "all_reduce": 2 * share * one.bytes,
        "all_gather": share * one.bytes,
        "reduce_scatter": (ranks - 1) * one.bytes,
        "all_to_all": share * one.bytes,
        "send": float(one.bytes),
        "recv": 0.0,  # at the same time as another rank's send
    }[one.operation]
    latency = one.calls * cluster.latency
    node, network = (speed * 1e9 * cluster.efficiency for speed in (cluster.node_gbs, cluster.network_gbs))
    if ranks * stride <= cluster.per_node:
        return latency + moved / node
    if one.operation != "all_to_all":  # a ring's slowest link decides
        return latency + moved / network
    nodes = ranks * stride // cluster.per_node
    outside = (nodes - 1) / nodes
    if layout.flex:  # of K copies, those to the same node travel together
        outside *= nodes * (1 - (1 - 1 / nodes) ** top_k) / top_k
    return latency + one.bytes * (outside / network + 1 / node)


def _stride(layout: Layout, one: Collective) -> int:
    """Returns the distance of a group's neighboring ranks: Megatron's order is tensor, context, data, pipeline."""
    strides = {
        "data": layout.tensor,
        "expert data": layout.expert * layout.expert_tensor,
        "context": layout.tensor,
        "expert": layout.expert_tensor,
        "pipeline": layout.gpus // layout.pipeline,
    }
    return strides.get(one.group, 1)


def model_operations(shape: ModelShape, batch: Batch) -> Operations:
    """Returns the model operations of a step, which MFU refers to."""
    return _operations(shape, work_of_step(shape, batch), None)


@functools.lru_cache(maxsize=256)
def _operations(shape: ModelShape, work: Work, recomputation: Recomputation | None) -> Operations:
    return operations(shape, work, recomputation=recomputation)
