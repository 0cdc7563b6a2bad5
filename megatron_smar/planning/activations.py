# SPDX-License-Identifier: Apache-2.0
"""Memory of activations: what each operation of the forward pass keeps for the backward pass, by part.

The sums list the tensors that autograd holds, in bytes, for Megatron's local layers as this project runs them on a CPU
(`LOCAL`; checked against the allocator, `benchmarks/plan_accuracy.py`) and for Transformer Engine's layers (`FUSED`;
from their sources and published peaks, not measured by this project).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.shape import DecoderShape, ModelShape

Implementation = Literal["local", "fused"]
INT64, FLOAT32, BOOL = 8, 4, 1


@dataclass(frozen=True)
class Activations:
    """Bytes by part.

    Attributes:
        attention: Norms, queries, keys, values and outputs of the attention, and the residual stream.
        experts: Norms, routing, dispatched tokens, and experts or dense feed-forward layers.
        vision: Vision encoder, connector and embedded tokens.
        output: Last norm, logits and loss.
        temporary: What forward and backward need at the peak beyond what is kept.
    """

    attention: int = 0
    experts: int = 0
    vision: int = 0
    output: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Local:
    """Sizes of a rank's share of a micro-batch.

    Attributes:
        positions: Positions of a row on this rank, s / CP.
        tokens: Tokens of the attention, b s / CP.
        shard: Tokens of the residual stream: with sequence parallelism an equal share of them.
        routed: Copies of tokens that the rank's experts compute, of one layer.
        element: Bytes of an activation.
    """

    positions: int
    tokens: int
    shard: int
    routed: float
    element: int


def local_sizes(shape: ModelShape, layout: Layout, batch: Batch, imbalance: float) -> Local:
    """Returns the sizes of a rank's share."""
    positions = batch.sequence // layout.context
    tokens = positions * layout.micro_batch
    shard = tokens // layout.tensor
    # A rank's tokens go to the experts once: its share of the sequence, gathered over expert tensor parallelism.
    routed = shard * shape.decoder.top_k * layout.expert_tensor * imbalance
    return Local(positions, tokens, shard, routed, 2 if layout.bf16 else 4)


def activations(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    stage: int = 0,
    imbalance: float = 1.0,
    implementation: Implementation | None = None,
) -> Activations:
    """Returns the bytes at the peak of forward and backward passes.

    Args:
        shape: The model.
        layout: The parallel layout.
        batch: What a step trains on.
        stage: The rank's pipeline stage.
        imbalance: Tokens to the rank's experts, relative to an even share.
        implementation: What the layers keep; None for the layout's.

    Raises:
        ValueError: The model has latent attention, whose activations are not modelled.
    """
    if shape.decoder.latent_attention:
        raise ValueError("the activations of latent attention (MLA) are not modelled; plan a model without it.")
    kind = implementation or ("fused" if layout.fused else "local")
    local = local_sizes(shape, layout, batch, imbalance)
    flying = in_flight(layout, batch, stage)
    attention = experts = 0.0
    is_full = layout.recomputation.granularity == "full"
    for layers in layout.layers_of(shape, stage):
        for layer in layers:
            if is_full:
                attention += local.shard * shape.decoder.hidden * local.element
                continue
            attention += attention_bytes(shape.decoder, layout, local, kind)
            experts += feed_forward_bytes(shape.decoder, layout, local, kind, shape.decoder.moe_layers[layer])
    chunk_share = flying / layout.chunks
    # The vision encoder's and the output layer's micro-batches in flight are those of the first and last chunk.
    vision = vision_bytes(shape, layout, batch, local) * min(flying, layout.pipeline + 1) if stage == 0 else 0
    output = output_bytes(shape.decoder, layout, local, kind) if stage == layout.pipeline - 1 else 0
    kept = Activations(int(attention * chunk_share), int(experts * chunk_share), int(vision), int(output))
    temporary = temporary_bytes(shape.decoder, layout, local, kind)
    return Activations(kept.attention, kept.experts, kept.vision, kept.output, int(temporary))


def in_flight(layout: Layout, batch: Batch, stage: int) -> int:
    """Returns the forward passes of chunks that wait for their backward pass, at most, on a pipeline stage.

    Megatron's 1F1B schedule, and its interleaved one, whose warm-up is longer.
    """
    total = layout.micro_batches(batch) * layout.chunks
    if layout.chunks == 1:
        return min(total, layout.pipeline - stage)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.chunks - 1) * layout.pipeline
    return min(total, warm_up + 1)


def attention_bytes(decoder: DecoderShape, layout: Layout, local: Local, kind: Implementation) -> float:
    """Returns what a layer's attention keeps of a micro-batch, with its norm and its residual."""
    e, t, hidden = local.element, local.tokens, decoder.hidden
    queries, keys = decoder.query_width / layout.tensor, decoder.key_width / layout.tensor
    kept = norm_bytes(hidden, local, layout, kind)
    logsumexp = t * decoder.heads / layout.tensor * FLOAT32
    output = t * queries * e + logsumexp
    if kind == "fused":
        # After the rotation: queries, keys and values; keys and values of all context-parallel ranks pass by in turn.
        return kept + t * (queries + 2 * keys) * e + output
    rotation = 4 * local.positions * decoder.head_size * e  # cosines and sines of queries and keys
    if layout.context == 1:
        # The product of the layer stays, since the values are a part of it.
        return kept + output + rotation + t * (queries + 2 * keys) * e + t * (queries + keys) * e
    everywhere = layout.context * t
    mask = local.positions * layout.context * local.positions * e
    return kept + output + rotation + t * queries * e + 2 * everywhere * keys * e + mask


def norm_bytes(hidden: int, local: Local, layout: Layout, kind: Implementation) -> float:
    """Returns what a norm keeps, with the residual that it reads."""
    n, e = local.shard, local.element
    again = layout.recomputation.granularity == "selective" and "layernorm" in layout.recomputation.modules
    if kind == "fused":
        return n * hidden * e * (1 if again else 2) + n * FLOAT32  # its input, and its output for the next product
    # In float32 input, normalized input and output; of bf16 the first two are float32 copies.
    return n * hidden * (2 * FLOAT32 + e) + n * FLOAT32


def feed_forward_bytes(
    decoder: DecoderShape, layout: Layout, local: Local, kind: Implementation, has_experts: bool
) -> float:
    """Returns what the second half of a layer keeps of a micro-batch: norm, routing, dispatched tokens, experts."""
    kept = norm_bytes(decoder.hidden, local, layout, kind)
    if not has_experts:
        return kept + _activated(local.tokens, decoder.ffn / layout.tensor, decoder, local, layout, kind)
    n, routed, experts, top_k = local.shard, local.routed, decoder.experts, decoder.top_k
    kept += n * (FLOAT32 * (2 * experts + top_k) + INT64 * top_k + BOOL * (2 * experts + 1))  # the router
    width = decoder.latent or decoder.hidden
    ffn = decoder.expert_ffn / layout.expert_tensor
    kept += routed * (width * local.element + FLOAT32)  # the tokens in the experts' order, with their weights
    if kind == "local":
        kept += n * experts * INT64 + routed * INT64  # the order
        kept += routed * width * local.element  # the experts' output, which their weights multiply
    else:
        kept += n * experts * 2 * FLOAT32  # the order, of int32
    kept += _activated(routed, ffn, decoder, local, layout, kind)
    if decoder.shared_ffn:
        kept += _activated(local.tokens, decoder.shared_ffn / layout.tensor, decoder, local, layout, kind)
    return kept


def _activated(
    tokens: float, ffn: float, decoder: DecoderShape, local: Local, layout: Layout, kind: Implementation
) -> float:
    """Returns what two linear layers and the activation between them keep, without their input."""
    first = (2 if decoder.gated else 1) * ffn
    again = layout.recomputation.granularity == "selective" and "moe_act" in layout.recomputation.modules
    # Local layers keep the activated gate as well.
    second = (2 if kind == "local" and decoder.gated else 1) * ffn
    return tokens * (first + (0 if again else second)) * local.element


def vision_bytes(shape: ModelShape, layout: Layout, batch: Batch, local: Local) -> float:
    """Returns what encoder, connector and embedding keep of a micro-batch; a frozen encoder keeps nothing."""
    vision, decoder, e = shape.vision, shape.decoder, local.element
    tiles = batch.most_tiles * layout.micro_batch
    embedded = local.tokens * decoder.hidden * e
    if not tiles:
        return embedded
    features = tiles * vision.tokens
    kept = embedded + features * (shape.connector_input + 2 * decoder.hidden) * e
    if shape.gradient_reaches_encoder:
        positions = tiles * (vision.patches + vision.extra_tokens)
        # Two norms, residuals, scaled residuals, queries, keys, values, output; the two sides of the activation.
        layer = positions * (10 * vision.hidden + 2 * vision.ffn) * e + positions * (vision.heads + 4) * FLOAT32
        kept += vision.layers * layer + positions * vision.hidden * e + tiles * vision.patches * vision.patch_values * e
    return kept


def output_bytes(decoder: DecoderShape, layout: Layout, local: Local, kind: Implementation) -> float:
    """Returns what the last norm, the output layer and the loss keep; the loss computes in float32."""
    logits = local.tokens * decoder.padded_vocabulary(layout.tensor) / layout.tensor
    return norm_bytes(decoder.hidden, local, layout, kind) + logits * (FLOAT32 + (local.element if layout.bf16 else 0))


def temporary_bytes(decoder: DecoderShape, layout: Layout, local: Local, kind: Implementation) -> float:
    """Returns the temporary memory of the backward pass where it is largest."""
    return 2 * local.shard * decoder.hidden * local.element
