# SPDX-License-Identifier: Apache-2.0
"""The sizes of a vision-language model on which its cost depends, without Megatron's or Hugging Face's configs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LatentAttention:
    """Attention that compresses keys and values (MLA); the latents are normalized.

    Attributes:
        rank: Size of the latent of keys and values.
        query_rank: Size of the queries' latent; 0 where queries have none.
        rotary: Numbers of a head's key that are rotated, the same for all heads.
        value: Size of a head's value.
    """

    rank: int
    query_rank: int
    rotary: int
    value: int

    @property
    def compressed(self) -> int:
        """Numbers of a token from which its keys and values follow."""
        return self.rank + self.rotary


@dataclass(frozen=True)
class DecoderShape:
    """The language model.

    Attributes:
        hidden: Hidden size, h.
        moe_layers: For each layer, whether it has experts.
        attention_weights: Weights of the attention's linear layers, per layer.
        score_width: Numbers per query and key that the attention multiplies: heads times the sizes of a head's key and
            of its value.
        heads: Attention heads.
        query_groups: Heads of keys and values.
        head_size: Size of a head's key.
        ffn: Intermediate size of a layer without experts.
        expert_ffn: Intermediate size of an expert.
        shared_ffn: Intermediate size of the shared experts.
        latent: Size of the tokens that experts get, where a projection makes them smaller; 0 for h.
        gated: Whether feed-forward layers have a gate: three matrices instead of two.
        experts: Number of experts of an MoE layer, E.
        top_k: Experts per token, K.
        vocabulary: Rows of the output layer; Megatron pads them for tensor parallelism.
        vocabulary_multiple: --make-vocab-size-divisible-by.
        has_biases: Whether linear layers have biases, experts' too.
        latent_attention: How the attention compresses keys and values; None if it does not.
        skips_unused: Whether the last layer's experts compute only positions whose loss counts; plans of memory,
            communication and time do not take it into account.
    """

    hidden: int
    moe_layers: tuple[bool, ...]
    attention_weights: int
    score_width: int
    heads: int
    query_groups: int
    head_size: int
    ffn: int
    expert_ffn: int
    shared_ffn: int
    latent: int
    gated: bool
    experts: int
    top_k: int
    vocabulary: int
    vocabulary_multiple: int = 1
    has_biases: bool = False
    latent_attention: LatentAttention | None = None
    skips_unused: bool = False

    def padded_vocabulary(self, tensor: int) -> int:
        """Returns the rows of the output layer with the padding for a tensor-parallel size."""
        return padded(self.vocabulary, self.vocabulary_multiple * tensor)

    def skipped(self, tokens: float, predicted: float) -> float:
        """Returns how many of the copies of tokens that are routed no expert computes.

        Args:
            tokens: Positions of the decoder.
            predicted: Those whose loss counts.
        """
        return self.top_k * (tokens - predicted) if self.skips_unused else 0.0

    def computed(self, routed: float, predicted: float) -> list[float]:
        """Returns how many copies of tokens each layer's experts compute.

        Args:
            routed: Those of all layers.
            predicted: Positions whose loss counts.
        """
        number = sum(self.moe_layers)
        if not self.skips_unused:
            return [routed / number if has_experts else 0.0 for has_experts in self.moe_layers]
        last = self.top_k * predicted
        others = (routed - last) / max(1, number - 1)
        return [others if has_experts else 0.0 for has_experts in self.moe_layers[:-1]] + [last]

    @property
    def matrices(self) -> int:
        """Weight matrices of a feed-forward layer."""
        return 3 if self.gated else 2

    @property
    def dense_weights(self) -> int:
        """Weights of a feed-forward layer without experts."""
        return self.matrices * self.hidden * self.ffn

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return self.matrices * (self.latent or self.hidden) * self.expert_ffn

    @property
    def shared_weights(self) -> int:
        """Weights of an MoE layer that every token uses: shared experts, and projections around experts."""
        return self.hidden * (self.matrices * self.shared_ffn + 2 * self.latent)

    @property
    def query_width(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.query_groups * self.head_size

    @property
    def value_width(self) -> int:
        """Numbers of a token's values."""
        return self.query_groups * (self.latent_attention.value if self.latent_attention else self.head_size)


@dataclass(frozen=True)
class VisionShape:
    """The vision encoder, whose layers are all alike.

    Attributes:
        hidden: Hidden size.
        layers: Number of layers.
        heads: Attention heads.
        ffn: Intermediate size of a layer.
        patches: Patches of a tile.
        extra_tokens: Tokens of a tile that are no patches, such as a class token.
        patch_values: Numbers of a patch: 3 channels times its pixels.
        tokens: Vision tokens of a tile after the pixel shuffle.
        scales_layers: Whether the outputs of attention and feed-forward layer are scaled, as InternViT's.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    patches: int
    extra_tokens: int
    patch_values: int
    tokens: int
    scales_layers: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's linear layers."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.ffn


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model, before it is sharded.

    Attributes:
        name: Its name in the trainer's model.
        size: Its elements.
        part: The part of the model that it belongs to, as `--freeze` names it.
        layer: The decoder's layer, from 0; None outside.
        tensor_parallel: Whether tensor parallelism shards it: a shard has `size` / t elements.
        expert: Whether it is one of an expert, and which, from 0.
        float32: Whether it stays float32 in a bf16 run.
    """

    name: str
    size: int
    part: str
    layer: int | None = None
    tensor_parallel: bool = False
    expert: int | None = None
    float32: bool = False


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it may have thousands of parameters
class ModelShape:
    """A vision-language model; its connector has two linear layers.

    Attributes:
        decoder: The language model.
        vision: The vision encoder.
        trained: The parts that are trained, as `--freeze` names them.
        parameters: All parameters in the model's order. Only memory and communication depend on them.
        modalities: Number of modalities, M.
        strategy: --modality-routing.
        allowed_experts: For each MoE layer, which experts the tokens of each modality may go to, [M][E], text first;
            None where all may go to all. Empty if that holds for every layer.
    """

    decoder: DecoderShape
    vision: VisionShape
    trained: frozenset[str]
    parameters: tuple[Parameter, ...] = ()
    modalities: int = 2
    strategy: str = "smar"
    allowed_experts: tuple[tuple[tuple[bool, ...], ...] | None, ...] = ()

    @property
    def connector_input(self) -> int:
        """Size of the vision features: the pixel shuffle folds patches into channels."""
        return self.vision.hidden * self.vision.patches // self.vision.tokens

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.size for parameter in self.parameters)

    @functools.cached_property
    def is_tied(self) -> bool:
        """Whether the output layer shares the embedding's weights."""
        return not any(parameter.name == "language_model.output_layer.weight" for parameter in self.parameters)

    @property
    def gradient_reaches_encoder(self) -> bool:
        """Whether the encoder has a backward pass."""
        return "vision" in self.trained


def padded(number: int, divisor: int) -> int:
    """Rounds up to a multiple."""
    return math.ceil(number / divisor) * divisor
