# SPDX-License-Identifier: Apache-2.0
"""A run's parallel layout and batch, which of them Megatron accepts for a model, and their flags."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_smar.planning.operations import Recomputation
from megatron_smar.planning.shape import ModelShape


@dataclass(frozen=True)
class Batch:
    """What every step trains on, whatever the layout.

    Attributes:
        sequence: Positions of a row, --seq-length.
        rows: Rows of a step over all replicas, --global-batch-size. With packing a row is a pack.
        samples: Samples of a row, which do not attend to each other; 1 without packing.
        tiles: Tiles of a row, mean.
        most_tiles: Tiles of the fullest row, for which there must be memory.
        filled: Share of the positions that are no padding. Only pipeline parallelism computes the padding.
        predicted: Share of the positions whose loss counts, the only ones with logits. The others are prompts,
            pictures and padding.
    """

    sequence: int
    rows: int
    samples: float = 1.0
    tiles: float = 0.0
    most_tiles: float = 0.0
    filled: float = 1.0
    predicted: float = 1.0

    def __post_init__(self) -> None:
        if self.sequence < 1 or self.rows < 1 or self.samples < 1:
            raise ValueError(
                f"a step has {self.rows} rows of {self.sequence} positions with {self.samples:g} samples; "
                "give at least 1 of each."
            )
        for name in ("filled", "predicted"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"the share {name} is {getattr(self, name)}; give a number above 0, at most 1.")
        if self.tiles < 0:
            raise ValueError(f"rows have {self.tiles} tiles; give 0 or more.")
        object.__setattr__(self, "most_tiles", max(self.most_tiles, self.tiles))


NOTHING = Recomputation()


@dataclass(frozen=True)
class Layout:
    """How a model is sharded over GPUs. Names and defaults follow Megatron's flags.

    Attributes:
        gpus: Number of GPUs.
        tensor: --tensor-model-parallel-size; above 1 with --sequence-parallel.
        pipeline: --pipeline-model-parallel-size.
        chunks: Model chunks of each pipeline stage (virtual stages); 1 without interleaving.
        context: --context-parallel-size.
        expert: --expert-model-parallel-size.
        expert_tensor: --expert-tensor-parallel-size.
        micro_batch: --micro-batch-size.
        recomputation: What the backward pass computes again.
        distributed_optimizer: --use-distributed-optimizer.
        overlap: --overlap-grad-reduce and --overlap-param-gather, which need the distributed optimizer.
        offload: --optimizer-cpu-offload: the optimizer's state is in the host's memory.
        flex: --moe-token-dispatcher-type flex, which sends a token to a node once, instead of alltoall.
        overlap_experts: --overlap-moe-expert-parallel-comm: the exchange of tokens overlaps with computation.
        bf16: --bf16, with gradients in float32 as Megatron's default; else all is float32.
        fused: Whether layers are Transformer Engine's instead of Megatron's local ones.
    """

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    micro_batch: int = 1
    recomputation: Recomputation = NOTHING
    distributed_optimizer: bool = True
    overlap: bool = True
    offload: bool = False
    flex: bool = False
    overlap_experts: bool = False
    bf16: bool = True
    fused: bool = True

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.gpus // (self.tensor * self.context * self.pipeline)

    @property
    def replicas(self) -> int:
        """Ranks with the same dense weights: data and context parallelism together."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same experts."""
        return self.gpus // (self.expert * self.expert_tensor * self.pipeline)

    def micro_batches(self, batch: Batch) -> int:
        """Returns the micro-batches of a replica per step."""
        return batch.rows // (self.micro_batch * self.data)

    def fullest_experts(self, shape: ModelShape, batch: Batch, imbalance: float) -> float:
        """Returns the tokens of the rank whose experts get most, relative to an even share, as a mean over layers.

        Experts that serve one modality share its tokens, so how many they get depends on the data.

        Args:
            shape: The model.
            batch: What a step trains on: its pictures are the vision tokens.
            imbalance: The same for experts that serve the same modalities.
        """
        if self.expert == 1:
            return 1.0
        tables = shape.allowed_experts or (None,)
        vision = min(1.0, batch.tiles * shape.vision.tokens / (batch.sequence * batch.filled))
        shares = [1 - vision, *[vision / (shape.modalities - 1)] * (shape.modalities - 1)]
        return imbalance * sum(self._fullest(table, shares) for table in tables) / len(tables)

    def _fullest(self, table: Sequence[Sequence[bool]] | None, shares: Sequence[float]) -> float:
        """Returns the same for a layer, if the tokens of a modality, a share of all, are spread over its experts."""
        if table is None:
            return 1.0
        experts = len(table[0]) // self.expert
        ranks = [range(rank * experts, (rank + 1) * experts) for rank in range(self.expert)]
        got = [
            sum(
                share * sum(own[expert] for expert in held) / sum(own) for share, own in zip(shares, table, strict=True)
            )
            for held in ranks
        ]
        return self.expert * max(got)

    def layers_of(self, shape: ModelShape, stage: int) -> list[list[int]]:
        """Returns the decoder's layers of a pipeline stage, for each of its chunks."""
        layers = len(shape.decoder.moe_layers) // (self.pipeline * self.chunks)
        starts = [(chunk * self.pipeline + stage) * layers for chunk in range(self.chunks)]
        return [list(range(start, start + layers)) for start in starts]

    def problem(self, shape: ModelShape, batch: Batch) -> str | None:
        """Returns why Megatron cannot train the model in this layout; None if it can."""
        decoder, layers = shape.decoder, len(shape.decoder.moe_layers)
        stages = self.pipeline * self.chunks
        rules = (
            (self.gpus % (self.tensor * self.context * self.pipeline), "TP x CP x PP does not divide the GPUs"),
            (self.gpus % (self.expert * self.expert_tensor * self.pipeline), "ETP x EP x PP does not divide the GPUs"),
            (decoder.query_groups % self.tensor, f"TP does not divide the {decoder.query_groups} key-value heads"),
            (max(1, decoder.experts) % self.expert, f"EP does not divide the {decoder.experts} experts"),
            (decoder.expert_ffn % self.expert_tensor, f"ETP does not divide the experts' size of {decoder.expert_ffn}"),
            (decoder.has_biases and self.expert_tensor > 1, "experts with biases need ETP 1"),
            (layers % stages, f"PP x chunks does not divide the {layers} layers"),
            (self.chunks > 1 and self.pipeline == 1, "chunks need PP above 1"),
            (batch.sequence % (2 * self.context if self.context > 1 else 1), "2 CP does not divide the sequence"),
            (batch.sequence % (self.tensor * self.context), "TP x CP does not divide the sequence"),
            (self.micro_batch > 1 and batch.samples > 1, "packs need a micro-batch of 1"),
            (self.overlap and not self.distributed_optimizer, "overlap needs the distributed optimizer"),
        )
        for broken, sentence in rules:
            if broken:
                return sentence
        if batch.rows % (self.micro_batch * self.data):
            return (
                f"micro-batch x replicas ({self.micro_batch} x {self.data}) does not divide the batch of {batch.rows}"
            )
        if self.chunks > 1 and self.micro_batches(batch) % self.pipeline:
            return f"the {self.micro_batches(batch)} micro-batches of chunked stages are no multiple of PP"
        return None

    def flags(self, shape: ModelShape, batch: Batch) -> list[str]:
        """Returns the layout as flags of pretrain_vlm.py."""
        flags: list[object] = ["--seq-length", batch.sequence, "--global-batch-size", batch.rows]
        flags += ["--micro-batch-size", self.micro_batch, "--tensor-model-parallel-size", self.tensor]
        flags += ["--sequence-parallel"] if self.tensor > 1 else []
        flags += ["--pipeline-model-parallel-size", self.pipeline, "--context-parallel-size", self.context]
        if self.chunks > 1:
            layers = len(shape.decoder.moe_layers) // (self.pipeline * self.chunks)
            flags += ["--num-layers-per-virtual-pipeline-stage", layers]
        if shape.decoder.experts:
            flags += ["--expert-model-parallel-size", self.expert, "--expert-tensor-parallel-size", self.expert_tensor]
        if self.recomputation.granularity == "full":
            flags += "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
        if self.recomputation.granularity == "selective":
            flags += ["--recompute-granularity", "selective", "--recompute-modules", *self.recomputation.modules]
        flags += ["--use-distributed-optimizer"] if self.distributed_optimizer else []
        flags += ["--overlap-grad-reduce", "--overlap-param-gather"] if self.overlap else []
        flags += ["--optimizer-cpu-offload"] if self.offload else []
        flags += ["--moe-token-dispatcher-type", "flex"] if self.flex else []
        flags += ["--overlap-moe-expert-parallel-comm"] if self.overlap_experts else []
        flags += ["--bf16"] if self.bf16 else []
        return list(map(str, flags))

    def __str__(self) -> str:
        sizes = (
            ("TP", self.tensor),
            ("PP", self.pipeline),
            ("VPP", self.chunks),
            ("CP", self.context),
            ("EP", self.expert),
            ("ETP", self.expert_tensor),
        )
        words = [f"{name}{size}" for name, size in sizes if size > 1 or name == "EP"]
        words += [f"DP{self.data}", f"MBS{self.micro_batch}"]
        again = self.recomputation
        words += {"full": ["recompute all"], "selective": ["recompute " + "+".join(again.modules)]}.get(
            again.granularity or "", []
        )
        return " ".join([*words, *(["offload"] if self.offload else [])])


# Selective recomputation that the planner tries; --recompute-modules takes more.
SELECTIVE = ("moe_act", "layernorm")


def recomputations(shape: ModelShape) -> Sequence[Recomputation]:
    """Returns what a run may recompute: nothing, some modules, or every layer."""
    layers = len(shape.decoder.moe_layers)
    return NOTHING, Recomputation("selective", SELECTIVE), Recomputation("full", layers=layers)


def powers(limit: int) -> list[int]:
    """Returns the powers of two up to a number."""
    return [2**exponent for exponent in range(max(1, limit).bit_length())]


def legal_layouts(shape: ModelShape, batch: Batch, gpus: int, per_node: int = 8) -> Iterator[Layout]:
    """Yields the layouts that Megatron accepts, in powers of two, tensor parallelism within a node.

    Args:
        shape: The model.
        batch: What a step trains on.
        gpus: Number of GPUs.
        per_node: GPUs of a node.
    """
    within = min(gpus, per_node)
    stages = [size for size in powers(min(gpus, 32)) if len(shape.decoder.moe_layers) % size == 0]
    contexts = powers(min(gpus, 16)) if batch.sequence >= 8192 else [1]
    experts = [size for size in powers(min(gpus, max(1, shape.decoder.experts)))]
    for tensor, pipeline, context, expert in itertools.product(powers(within), stages, contexts, experts):
        if gpus % (tensor * pipeline * context):
            continue
        base = Layout(gpus, tensor, pipeline, context=context, expert=expert)
        for expert_tensor in {1, tensor} if shape.decoder.experts else {1}:
            for chunks in _chunks(shape, pipeline):
                variant = replace(base, expert_tensor=expert_tensor, chunks=chunks)
                yield from _variants(shape, batch, variant)


def _chunks(shape: ModelShape, pipeline: int) -> list[int]:
    """Returns numbers of chunks per stage that divide the stage's layers: none, half, and one layer per chunk."""
    layers = len(shape.decoder.moe_layers) // pipeline
    return [1] if pipeline == 1 else sorted({1, *(layers // size for size in (1, 2) if layers % size == 0)})


def _variants(shape: ModelShape, batch: Batch, layout: Layout) -> Iterator[Layout]:
    sizes = [1] if batch.samples > 1 else [1, 2, 4, 8]
    for micro_batch, recomputation, offload in itertools.product(sizes, recomputations(shape), (False, True)):
        variant = replace(layout, micro_batch=micro_batch, recomputation=recomputation, offload=offload)
        if variant.problem(shape, batch) is None:
            yield variant
