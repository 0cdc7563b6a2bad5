# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, from the shape of the model and the work that the step had.

A multiplication and an addition are two operations. Only matrix products count (linear layers, attention scores and
their sums, the output layer), as for torch's FLOP counter. With what is trained, and what is not, each product has up
to three parts: forward, gradient of its input, gradient of its weights.

Model operations are what the step needs: tokens and pictures without padding, each causal attention score once, no
recomputation. Hardware operations are what is executed: with padding, and recomputed layers twice. MFU is the first
divided by the device's peak, HFU the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_smar.planning.shape import ModelShape


@dataclass(frozen=True)
class Work:
    """What a micro-batch, a step or an interval of training has to compute; additive.

    Attributes:
        samples: Number of samples.
        tokens: Positions of the decoder.
        pairs: Attention scores per head: the sum over sequences of n^2, or of n (n + 1) / 2 for causal attention.
        routed: Copies of tokens that experts compute, over all MoE layers.
        tiles: Tiles of pictures.
        predicted: Positions whose loss counts, the only ones with logits.
    """

    samples: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    routed: float = 0.0
    tiles: float = 0.0
    predicted: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Operations:
    """Floating-point operations.

    Attributes:
        decoder: Of the language model.
        encoder: Of the vision encoder and the connector.
    """

    decoder: float = 0.0
    encoder: float = 0.0

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.decoder + self.encoder


@dataclass(frozen=True)
class Recomputation:
    """What is computed again in the backward pass, as Megatron's flags of these names say.

    Attributes:
        granularity: --recompute-granularity.
        modules: --recompute-modules, of selective recomputation.
        layers: Number of decoder layers of which everything is recomputed, of full recomputation.
    """

    granularity: Literal["full", "selective"] | None = None
    modules: tuple[str, ...] = ()
    layers: int = 0


@dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        part: The part of the model that it belongs to, as --freeze names it.
        forward: Operations of its forward pass.
        module: Its name in --recompute-modules, if it has one.
        has_weights: Whether one factor is a weight. Attention scores have none: both factors have gradients.
    """

    part: str
    forward: float
    module: str = ""
    has_weights: bool = True


# Products that have the same input, or that nothing depends on in between.
Stage = Sequence[Product]


def encoder_stages(shape: ModelShape, work: Work) -> Iterator[Stage]:
    """Yields the products of vision encoder and connector, from input to output."""
    vision, decoder = shape.vision, shape.decoder
    positions = vision.patches + vision.extra_tokens
    yield [Product("vision", 2 * work.tiles * vision.patches * vision.patch_values * vision.hidden)]
    for _ in range(vision.layers):
        yield [Product("vision", 2 * work.tiles * positions * vision.layer_weights)]
        yield [Product("vision", 4 * work.tiles * positions**2 * vision.hidden, has_weights=False)]
    features = work.tiles * vision.tokens
    yield [Product("connector", 2 * features * shape.connector_input * decoder.hidden)]
    yield [Product("connector", 2 * features * decoder.hidden**2)]


def layer_stages(shape: ModelShape, work: Work, has_experts: bool, routed: float) -> Iterator[Stage]:
    """Yields the products of one of the decoder's layers, whose experts compute `routed` copies of tokens."""
    decoder = shape.decoder
    yield [Product("attention", 2 * work.tokens * decoder.attention_weights)]
    yield [Product("attention", 2 * work.pairs * decoder.score_width, "core_attn", has_weights=False)]
    if has_experts:
        yield [
            Product("router", 2 * work.tokens * decoder.hidden * decoder.experts, "moe"),
            Product("experts", 2 * routed * decoder.expert_weights, "moe"),
            Product("experts", 2 * work.tokens * decoder.shared_weights, "moe"),
        ]
    else:
        yield [Product("dense", 2 * work.tokens * decoder.dense_weights, "mlp")]


def _total(stages: Iterable[Stage], trained: frozenset[str], has_gradient: bool) -> tuple[float, bool]:
    """Returns the operations of forward and backward pass, and whether the output has a gradient.

    Args:
        stages: The products, from input to output.
        trained: Parts that are trained.
        has_gradient: Whether the input has a gradient.
    """
    total = 0.0
    for stage in stages:
        for product in stage:
            gradients = has_gradient + (product.part in trained) if product.has_weights else 2 * has_gradient
            total += product.forward * (1 + gradients)
        has_gradient = has_gradient or any(product.part in trained for product in stage if product.has_weights)
    return total, has_gradient


def operations(
    shape: ModelShape, work: Work, trains: bool = True, recomputation: Recomputation | None = None
) -> Operations:
    """Returns the operations of some work.

    Args:
        shape: The model, with the parts that are trained.
        work: What is computed.
        trains: Whether there is a backward pass.
        recomputation: What the backward pass computes again; None for model operations.
    """
    trained = shape.trained if trains else frozenset()
    encoder, _ = _total(encoder_stages(shape, work), trained, False)
    has_gradient = bool(trained)  # Megatron's block of layers always computes the gradient of its input
    decoder, again = 0.0, recomputation or Recomputation()
    routed = shape.decoder.computed(work.routed, work.predicted)
    for number, has_experts in enumerate(shape.decoder.moe_layers):
        stages = list(layer_stages(shape, work, has_experts, routed[number]))
        total, has_gradient = _total(stages, trained, has_gradient)
        products = [product for stage in stages for product in stage]
        if again.granularity == "full" and number < again.layers and has_gradient:
            total += sum(product.forward for product in products)
        elif again.granularity == "selective" and has_gradient:
            total += sum(product.forward for product in products if product.module in again.modules)
        decoder += total
    head = Product("embeddings", 2 * work.predicted * shape.decoder.hidden * shape.decoder.vocabulary)
    return Operations(decoder + _total([[head]], trained, has_gradient)[0], encoder)
