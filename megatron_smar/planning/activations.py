# SPDX-License-Identifier: Apache-2.0
"""Memory of activations: what each operation of the forward pass keeps for the backward pass, by part.

The sums list the tensors that autograd holds, in bytes, for Megatron's local layers as this project runs them on a CPU
(`LOCAL`; checked against the allocator, `benchmarks/plan_accuracy.py`) and for Transformer Engine's layers (`FUSED`;
from their sources and published peaks, not measured by this project).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.shape import DecoderShape, LatentAttention, ModelShape

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
        predicted: Those with logits.
        shard: Tokens of the residual stream: with sequence parallelism an equal share of them.
        routed: Copies of tokens that the rank's experts compute, of one layer.
        busiest: Those of the one of the rank's experts that gets most.
        element: Bytes of an activation.
        packed: Whether rows are packs.
    """

    positions: int
    tokens: int
    predicted: float
    shard: int
    routed: float
    busiest: float
    element: int
    packed: bool


def implementation_of(layout: Layout) -> Implementation:
    """Returns whose layers a layout has."""
    return "fused" if layout.fused else "local"


def local_sizes(
    shape: ModelShape, layout: Layout, batch: Batch, imbalance: float, busiest: float | None = None
) -> Local:
    """Returns the sizes of a rank's share.

    Args:
        shape: The model.
        layout: The parallel layout.
        batch: What a step trains on.
        imbalance: Tokens to the rank's experts, relative to an even share.
        busiest: Tokens to the rank's expert that gets most, relative to an even share; None if all get the same.
    """
    positions = batch.sequence // layout.context
    tokens = positions * layout.micro_batch
    shard = tokens // layout.tensor
    # A rank's tokens go to the experts once: its share of the sequence, gathered over expert tensor parallelism.
    even = shard * shape.decoder.top_k * layout.expert_tensor
    most = even * layout.expert / max(1, shape.decoder.experts) * (imbalance if busiest is None else busiest)
    element = 2 if layout.bf16 else 4
    predicted, packed = tokens * batch.predicted, batch.samples > 1
    return Local(positions, tokens, predicted, shard, even * imbalance, most, element, packed)


def activations(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    stage: int = 0,
    imbalance: float = 1.0,
) -> Activations:
    """Returns the bytes at the peak of forward and backward passes.

    Args:
        shape: The model.
        layout: The parallel layout.
        batch: What a step trains on.
        stage: The rank's pipeline stage.
        imbalance: Tokens to the rank's experts, relative to an even share.
    """
    return max(peaks(shape, layout, batch, stage, imbalance), key=lambda moment: moment.total)


def peaks(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    stage: int = 0,
    imbalance: float = 1.0,
    backward: Sequence[tuple[float, float | None]] | None = None,
) -> list[Activations]:
    """Returns the bytes at the moments that can be the peak.

    Args:
        shape: As for `activations`, as what follows.
        layout: The parallel layout.
        batch: What a step trains on.
        stage: The rank's pipeline stage.
        imbalance: Tokens to the rank's experts, relative to an even share.
        backward: The same of each layer of the chunk whose backward pass is looked at, and the tokens to the expert
            that gets most, as for `local_sizes`; None if all layers are alike.
    """
    kind = implementation_of(layout)
    local = local_sizes(shape, layout, batch, imbalance)
    kept = _kept(shape, layout, batch, local, kind, stage)
    alike = [(imbalance, None)] * len(layout.layers_of(shape, stage)[-1])
    sizes = [local_sizes(shape, layout, batch, *of_layer) for of_layer in backward or alike]
    moments = _layers_backward(shape, layout, sizes, kind, stage, kept)
    if stage == layout.pipeline - 1:
        moments += _loss_phases(shape, layout, batch, local, kept)
    return moments


def _kept(
    shape: ModelShape, layout: Layout, batch: Batch, local: Local, kind: Implementation, stage: int
) -> Activations:
    """Returns what all micro-batches in flight keep."""
    decoder, hidden_bytes = shape.decoder, local.shard * shape.decoder.hidden * local.element
    flying, is_last = in_flight(layout, batch, stage), stage == layout.pipeline - 1
    layers = [layer for chunk in layout.layers_of(shape, stage) for layer in chunk]
    passes = flying / layout.chunks  # of the whole stage
    if layout.recomputation.granularity == "full":
        # The input of a chunk's first layer is what was embedded or received.
        attention, experts = passes * (len(layers) - layout.chunks) * hidden_bytes, 0.0
    else:
        attention = passes * len(layers) * attention_bytes(decoder, layout, local, kind)
        experts = passes * sum(
            feed_forward_bytes(decoder, layout, local, kind, decoder.moe_layers[layer]) for layer in layers
        )
    is_sent = layout.pipeline > 1 and (layout.chunks > 1 or not is_last)
    if is_sent and layout.recomputation.granularity != "full":  # Megatron frees a chunk's output after it has been sent
        sent = flying - (1 if layout.chunks > 1 else 0)
        attention -= sent * decoder.hidden * local.shard * _residual(local, kind)
    vision = 0.0
    if stage == 0:
        first = min(flying, 2 * layout.pipeline) if layout.chunks > 1 else flying
        vision = first * vision_bytes(shape, layout, batch, local)
    output = output_bytes(decoder, layout, local, kind) if is_last else 0
    return Activations(
        int(attention), int(experts), int(vision), int(output), _exchanged(layout, batch, local, shape, stage)
    )


def _exchanged(layout: Layout, batch: Batch, local: Local, shape: ModelShape, stage: int) -> int:
    """Returns the bytes of what pipeline stages have received, and of gradients that wait to be sent."""
    if layout.pipeline == 1:
        return 0
    flying, is_first, is_last = in_flight(layout, batch, stage), stage == 0, stage == layout.pipeline - 1
    if layout.chunks == 1:
        tensors = (0 if is_first else flying + 1) + (0 if is_last else 1)
    else:  # two receives are always under way, and gradients of chunks are added
        inputs = max(1, flying - 2 * layout.pipeline) if is_first else flying
        tensors = inputs + (3 if is_first else 4)
    return tensors * local.shard * shape.decoder.hidden * local.element


def _loss_phases(shape: ModelShape, layout: Layout, batch: Batch, local: Local, kept: Activations) -> list[Activations]:
    """Returns what is alive in the loss, and in the backward pass of the output layer."""
    decoder, e = shape.decoder, local.element
    rows = decoder.padded_vocabulary(layout.tensor) // layout.tensor
    chosen = temporary = local.predicted * decoder.hidden * e
    has_gradient = "embeddings" in shape.trained and not layout.fused
    if has_gradient:
        temporary += rows * decoder.hidden * e
    freed = int(local.predicted * rows * FLOAT32) if layout.bf16 else 0  # the gradient has replaced the float32 logits
    backward = replace(kept, output=kept.output - freed, temporary=kept.temporary + int(temporary))
    # In the forward pass the last norm's output is alive as well, of all positions, and the embedded tokens.
    tokens = local.tokens * decoder.hidden * e
    embedded = 0 if layout.pipeline > 1 or _keeps_embedded(layout, local) else tokens
    forward = replace(kept, temporary=kept.temporary + tokens, vision=kept.vision + embedded)
    if not (has_gradient and layout.bf16):
        return [forward, backward]
    # The weight's gradient becomes float32 before it is added to the buffer; logits are gone.
    output = output_bytes(decoder, layout, local, "local") - chosen - local.predicted * rows * (FLOAT32 + e)
    temporary += rows * decoder.hidden * FLOAT32
    return [forward, backward, replace(kept, output=int(output), temporary=int(kept.temporary + temporary))]


def _layers_backward(
    shape: ModelShape,
    layout: Layout,
    sizes: Sequence[Local],
    kind: Implementation,
    stage: int,
    kept: Activations,
) -> list[Activations]:
    """Returns what is alive while a layer of the stage's last chunk computes the gradients of its feed-forward half.

    That layer is the last one, whose gradients come first; if layers are computed again, any of them. `sizes` are those
    of each layer of the chunk.
    """
    decoder, layers = shape.decoder, layout.layers_of(shape, stage)[-1]
    if layout.recomputation.granularity != "full":
        gradients = _feed_forward_gradients(shape, layout, sizes[-1], kind, decoder.moe_layers[layers[-1]])
        if stage == layout.pipeline - 1:
            kept = _after_the_loss(kept, decoder.hidden, layout, sizes[-1], kind)
        return [
            replace(kept, experts=int(kept.experts - gone), output=0, temporary=int(kept.temporary + needed))
            for gone, needed in gradients
        ]
    found = []
    for position, (layer, local) in enumerate(zip(layers, sizes, strict=True)):
        has_experts, finished = decoder.moe_layers[layer], len(layers) - 1 - position
        # Dispatchers keep their last tokens' routing: that of the forward pass, then that which was computed again.
        routing = local.shard * (decoder.experts * (FLOAT32 + BOOL) + decoder.top_k * INT64)
        again = attention_bytes(decoder, layout, local, kind)
        again += feed_forward_bytes(decoder, layout, local, kind, has_experts)
        # Autograd keeps the gradients of the inputs of layers that are done; the last layer's is the output layer's.
        again += max(1, finished) * local.shard * decoder.hidden * local.element + finished * routing
        experts = int(kept.experts + position * routing)
        for gone, needed in _feed_forward_gradients(shape, layout, local, kind, has_experts):
            temporary = int(kept.temporary + again + needed - gone)
            found.append(replace(kept, experts=experts, output=0, temporary=temporary))
    return found


def _after_the_loss(kept: Activations, hidden: int, layout: Layout, local: Local, kind: Implementation) -> Activations:
    """Returns what is kept on the last stage while a layer's gradients are computed."""
    read = local.shard * hidden
    if layout.chunks == 1:  # the gradient of what the final norm read has taken its place
        attention = kept.attention - read * _residual(local, kind)
        return replace(kept, attention=attention, temporary=kept.temporary + read * local.element)
    # Most is alive in an earlier chunk: the gradient that it received, and the last chunk's, which is being sent.
    return replace(kept, temporary=kept.temporary + 2 * read * local.element)


def _feed_forward_gradients(
    shape: ModelShape, layout: Layout, local: Local, kind: Implementation, has_experts: bool
) -> tuple[tuple[float, float], ...]:
    """Returns, for the gradients of each operation of a feed-forward layer, what is freed before and what they need."""
    decoder, e = shape.decoder, local.element
    tokens = local.routed if has_experts else local.tokens
    width = decoder.latent or decoder.hidden if has_experts else decoder.hidden
    ffn = decoder.expert_ffn / layout.expert_tensor if has_experts else decoder.ffn / layout.tensor
    matrices = decoder.experts // layout.expert if has_experts else 1
    first = (2 if decoder.gated else 1) * ffn
    trained = ("experts" if has_experts else "dense") in shape.trained
    weights = matrices * width * e if trained and kind == "local" else 0  # others accumulate in the buffers directly
    freed = tokens * width * e if has_experts and kind == "local" else 0
    inputs = tokens * ffn * e
    # The experts' output times float32 weights: its gradient, both factors, and the gradient that the experts get.
    weighted = tokens * width * (3 * FLOAT32 + e) if freed and e < FLOAT32 else 0
    if freed and decoder.gated:
        # Of all experts the gradients of tokens; of one the activation, its gradient, and that of gates and ups.
        scratch = local.busiest * (2 * ffn + first)
        return (0, weighted), (freed, (2 * tokens * width + scratch) * e + weights * (first + ffn))
    # The second linear layer, the activation, the first linear layer: what each has used is then freed.
    return (
        (0, weighted),
        (freed, tokens * (ffn + width) * e + weights * ffn),
        (freed + inputs, tokens * (ffn + first + ffn / matrices) * e),  # the last: one expert's product
        (freed + inputs + tokens * first * e, tokens * (first + width) * e + weights * first),
    )


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
    latent = decoder.latent_attention
    queries, keys, values = (
        width / layout.tensor for width in (decoder.query_width, decoder.key_width, decoder.value_width)
    )
    # The residual is what the norms read; of bf16 the local norms keep a float32 copy instead.
    kept = norm_bytes(hidden, local, layout, kind) + 2 * local.shard * hidden * _residual(local, kind)
    kept += t * decoder.heads / layout.tensor * FLOAT32  # sums of exponentials
    if latent:
        kept += latent_bytes(latent, local, kind)
        if values < keys and (kind == "local" or local.packed):  # values are padded, and the output trimmed
            kept += t * values * e
            values = keys
    output = t * decoder.heads * values / decoder.query_groups * e
    if kind == "fused":
        # After the rotation: queries, keys and values; keys and values of all context-parallel ranks pass by in turn.
        return kept + t * (queries + keys + values) * e + output
    kept += 4 * local.positions * (latent.rotary if latent else decoder.head_size) * e  # cosines, sines
    if layout.context > 1:  # with the mask; keys and values of all ranks are repeated for every head
        everywhere = layout.context * (t * queries * e + output)
        return kept + output + t * queries * e + everywhere + local.positions**2 * layout.context * e
    if not latent:
        kept += t * (queries + keys) * e  # the product of the layer stays, since the values are a part of it
    return kept + output + t * (queries + keys + values) * e


def latent_bytes(latent: LatentAttention, local: Local, kind: Implementation) -> float:
    """Returns what the latents of a layer and their norms keep."""
    # Local layers gather latents, of which a rank's share is then a view.
    tokens, norms = local.tokens if kind == "local" else local.shard, 2 if latent.query_rank else 1
    normalized = local.shard * (latent.rank + latent.query_rank) * (_norm_copies(local, kind) + local.element)
    read = tokens * (latent.compressed + latent.query_rank) * _residual(local, kind)
    return read + normalized + norms * local.shard * FLOAT32


def _residual(local: Local, kind: Implementation) -> int:
    return 0 if kind == "local" and local.element < FLOAT32 else local.element


def _norm_copies(local: Local, kind: Implementation) -> int:
    """Returns the bytes per number that a norm itself keeps: locally its normalized input, and of bf16 its copy."""
    if kind == "fused":
        return 0
    return FLOAT32 + (FLOAT32 if local.element < FLOAT32 else 0)


def norm_bytes(hidden: int, local: Local, layout: Layout, kind: Implementation) -> float:
    """Returns what a norm keeps besides the residual that it reads, with its output, which the next product reads."""
    again = layout.recomputation.granularity == "selective" and "layernorm" in layout.recomputation.modules
    output = 0 if kind == "fused" and again else local.element
    return local.shard * hidden * (_norm_copies(local, kind) + output) + local.shard * FLOAT32


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
    # This project's experts keep gates and ups alone; a plain gate, as of shared experts, keeps both factors too.
    ours = kind == "local" and decoder.gated
    kept += routed * 2 * ffn * local.element if ours else _activated(routed, ffn, decoder, local, layout)
    if decoder.shared_ffn:
        kept += _activated(local.tokens, decoder.shared_ffn / layout.tensor, decoder, local, layout, kind)
    return kept


def _activated(
    tokens: float, ffn: float, decoder: DecoderShape, local: Local, layout: Layout, kind: Implementation = "fused"
) -> float:
    """Returns what two linear layers and the activation between them keep, without their input."""
    first = (2 if decoder.gated else 1) * ffn
    if kind == "local" and decoder.gated:
        first += 2 * ffn  # a plain gate keeps both factors
    again = layout.recomputation.granularity == "selective" and "moe_act" in layout.recomputation.modules
    return tokens * (first + (0 if again else ffn)) * local.element


def _keeps_embedded(layout: Layout, local: Local) -> bool:
    """Returns whether the embedded tokens stay: as the first residual, or to compute the first layer again."""
    return _residual(local, implementation_of(layout)) > 0 or layout.recomputation.granularity == "full"


def vision_bytes(shape: ModelShape, layout: Layout, batch: Batch, local: Local) -> float:
    """Returns what encoder, connector and embedding keep of a micro-batch; a frozen encoder keeps nothing."""
    vision, decoder, e = shape.vision, shape.decoder, local.element
    # Tensor- and context-parallel ranks share the tiles.
    tiles = math.ceil(batch.most_tiles * layout.micro_batch / (layout.tensor * layout.context))
    kept: float = local.tokens * decoder.hidden * e if _keeps_embedded(layout, local) else 0
    if layout.tensor > 1:
        kept += local.tokens * (INT64 + BOOL)  # token ids within this rank's rows, and which are not
    if not tiles:
        return kept
    kept += local.tokens * (INT64 + 2 * BOOL)  # places of features
    features = batch.most_tiles * layout.micro_batch * vision.tokens
    if "connector" in shape.trained:
        kept += features * (shape.connector_input + 2 * decoder.hidden) * e
    elif shape.gradient_reaches_encoder:
        kept += features * decoder.hidden * e
    if shape.gradient_reaches_encoder:
        positions = tiles * (vision.patches + vision.extra_tokens)
        # Two norms, two residuals, queries, keys, values and output; what is scaled; both sides of the activation.
        width = (8 + 2 * vision.scales_layers) * vision.hidden + 2 * vision.ffn
        kept += vision.layers * positions * (width * e + (vision.heads + 4) * FLOAT32)
    return kept


def output_bytes(decoder: DecoderShape, layout: Layout, local: Local, kind: Implementation) -> float:
    """Returns what the last norm, the output layer and the loss keep; the loss computes in float32.

    Only positions whose loss counts have logits; they are taken out of the norm's output, which is not kept.
    """
    copies = _norm_copies(local, kind) * local.shard * decoder.hidden + local.shard * FLOAT32
    logits = local.predicted * decoder.padded_vocabulary(layout.tensor) / layout.tensor
    chosen = local.predicted * decoder.hidden * local.element
    return copies + chosen + logits * (FLOAT32 + (local.element if layout.bf16 else 0))
