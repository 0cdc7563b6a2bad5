# SPDX-License-Identifier: Apache-2.0
"""The sizes of a vision-language model on which its cost depends, without Megatron's or Hugging Face's configs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """The language model.

    Attributes:
        hidden: Hidden size, h.
        moe_layers: For each layer, whether it has experts.
        attention_weights: Weights of the attention's linear layers, per layer.
        score_width: Numbers per query and key that the attention multiplies: heads times the sizes of a head's key and
            of its value.
        dense_weights: Weights of a feed-forward layer without experts.
        expert_weights: Weights of one expert.
        shared_weights: Weights of an MoE layer that every token uses: shared experts, and projections around experts.
        experts: Number of experts of an MoE layer, E.
        top_k: Experts per token, K.
        vocabulary: Rows of the output layer, with Megatron's padding.
    """

    hidden: int
    moe_layers: tuple[bool, ...]
    attention_weights: int
    score_width: int
    dense_weights: int
    expert_weights: int
    shared_weights: int
    experts: int
    top_k: int
    vocabulary: int


@dataclass(frozen=True)
class VisionShape:
    """The vision encoder, whose layers are all alike.

    Attributes:
        hidden: Hidden size.
        layers: Number of layers.
        layer_weights: Weights of a layer's linear layers.
        patches: Patches of a tile.
        extra_tokens: Tokens of a tile that are no patches, such as a class token.
        patch_values: Numbers of a patch: 3 channels times its pixels.
        tokens: Vision tokens of a tile after the pixel shuffle.
    """

    hidden: int
    layers: int
    layer_weights: int
    patches: int
    extra_tokens: int
    patch_values: int
    tokens: int


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model; its connector has two linear layers.

    Attributes:
        decoder: The language model.
        vision: The vision encoder.
        trained: The parts that are trained, as `--freeze` names them.
    """

    decoder: DecoderShape
    vision: VisionShape
    trained: frozenset[str]

    @property
    def connector_input(self) -> int:
        """Size of the vision features: the pixel shuffle folds patches into channels."""
        return self.vision.hidden * self.vision.patches // self.vision.tokens
