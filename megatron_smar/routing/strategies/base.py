# SPDX-License-Identifier: Apache-2.0
"""The interface of a routing strategy; the router does everything that is the same for all strategies.

A strategy is one file with two classes: a config, which defines its flags, its checks and its metrics, and a module, of
which each MoE layer has an instance. A micro-batch passes through a layer's router in this order:

    gate -> logits -> modality bias -> allowed, choice bias -> Megatron's top-k -> sums -> one all-reduce -> losses
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from megatron_smar.routing.statistics import RoutingStatistics

NO_FLAG: Mapping[str, Any] = {"flag": False}  # metadata of a config field that is not a flag


@dataclass(frozen=True)
class Metric:
    """A number that a strategy reports for each MoE layer.

    Attributes:
        name: The metric's name on the console, in TensorBoard and in W&B. The name of a loss ends in "loss", by which
            Megatron recognizes what to average over the steps since the last console line.
        weighted: False for a loss, which is reported as the main loss is: the mean over steps on the console, the
            step's value elsewhere. True for a measure: a mean over micro-batches, each with its own weight.
        on_console: Whether a measure's mean over the layers is printed on the console. A loss is, unless it is
            below 0: Megatron prints none of those.

    Raises:
        ValueError: The name of a loss does not end in "loss".
    """

    name: str
    weighted: bool = False
    on_console: bool = True

    def __post_init__(self) -> None:
        if not self.weighted and not self.name.endswith("loss"):
            raise ValueError(f"the metric {self.name!r} is not weighted, so it is a loss: end its name in 'loss'.")


@dataclass(frozen=True)
class RoutedLayer:
    """Properties of the MoE layer that a strategy routes.

    Attributes:
        num_experts: E, the number of experts.
        top_k: K, experts per token.
        hidden_size: h, the model's hidden size.
        modalities: Names of the M modalities, by id.
        sequence_parallel: Whether each tensor-parallel rank has its own shard of the sequence.
        dtype: The data type of the backbone's gate.
        gate_bias: Whether the backbone's gate has a bias.
        score_function: The function from logits to scores (--moe-router-score-function).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    modalities: tuple[str, ...]
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    gate_bias: bool = False
    score_function: str = "softmax"

    @property
    def num_modalities(self) -> int:
        """M, the number of modalities."""
        return len(self.modalities)


class GateWeights(Protocol):
    """A gate's parameters."""

    @property
    def weight(self) -> Tensor:
        """The weight, [E, h]."""

    @property
    def bias(self) -> Tensor | None:
        """The bias, [E], or None."""


class BackboneGate(Protocol):
    """The backbone's gate as a strategy calls it."""

    def __call__(self, hidden: Tensor, *others: GateWeights) -> Tensor:
        """Returns logits, as Megatron computes them: its data types, its matrix product.

        Args:
            hidden: The router's input, [s, b, h].
            *others: n further gates, which the same matrix product computes.

        Returns:
            The logits of the backbone's gate and the others, one after another, [s, b, (1 + n) E].
        """


class SampleSums(Protocol):
    """Sums over the tokens of each sample of a micro-batch."""

    ranks: int
    """Number of ranks that compute the same sums, because they share the replica's samples."""

    def __call__(self, values: Tensor) -> Tensor:
        """Returns the sums [S, C] of values [N, C] over the tokens of each sample, also those on other ranks.

        S is at least the number of samples; the rows of samples that do not exist are 0. Gradients pass to this rank's
        tokens.
        """
        ...


class RoutedTokens(NamedTuple):
    """This rank's tokens of a micro-batch, after the choice of experts.

    Attributes:
        hidden: The router's input, [N, h].
        logits: Router logits with the modality bias, [N, E]; -inf for experts that a token's modality may not choose
            (`allowed`).
        weights: Top-k weights renormalized over the chosen experts (SMAR, Eq. 5), 0 where not chosen, [N, E].
        routing_map: The chosen experts, [N, E] bool.
        modality_mask: One-hot modalities, [N, M] bool; all False for padding.
        scores: Soft modality scores by attention, [N, M], all 0 for padding, without gradient; None unless the config
            has `needs_attention_scores`.
        sample_sums: Sums over the tokens of each sample; None unless the config has `needs_samples`.
    """

    hidden: Tensor
    logits: Tensor
    weights: Tensor
    routing_map: Tensor
    modality_mask: Tensor
    scores: Tensor | None = None
    sample_sums: SampleSums | None = None


class LayerRouting(NamedTuple):
    """How one layer routed a micro-batch, over all ranks that take part in the reduction.

    Attributes:
        number: The layer's number, from 1; multi-token prediction layers are counted separately, from 1 too.
        iteration: The step's number, from 0.
        statistics: Sums of counts, weights and tokens per modality.
        sums: The strategy's own sums, by name.
        distance: MRD distance, a scalar.
        comparable: 1 where at least two modalities have tokens. Otherwise 0, and the distance is 0 too.
        allowed: The experts that each modality may choose, [M, E] bool; None for all experts.
    """

    number: int
    iteration: int
    statistics: RoutingStatistics
    sums: Mapping[str, Tensor]
    distance: Tensor
    comparable: Tensor
    allowed: Tensor | None = None


class AuxiliaryLoss(NamedTuple):
    """A loss of one layer and micro-batch.

    Attributes:
        value: The loss as reported, a scalar. The router corrects it for Megatron's reductions of the gradients.
        coefficient: The loss's weight in this step; with 0 it is only reported.
    """

    value: Tensor
    coefficient: float


class Weighted(NamedTuple):
    """A metric's value in one layer and micro-batch, and its weight in the mean, both scalars."""

    value: Tensor
    weight: Tensor


class RoutingStrategy(nn.Module):
    """The routing strategy of one MoE layer. A subclass overrides the methods that it needs.

    Parameters and persistent buffers are saved in checkpoints, under `router.strategy`. Buffers, which hold statistics
    of many steps, keep their precision when the model is converted to half precision.

    Args:
        config: The strategy's settings.
        layer: Sizes of the MoE layer.
    """

    def __init__(self, config: StrategyConfig, layer: RoutedLayer) -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits:
                setattr(self, name, before.to(after.device))
        return self

    def starts(self, gate: GateWeights) -> dict[str, Tensor]:
        """Returns values that the strategy's parameters start with, by name; the others start as they were built.

        Called for a new model, and again when a run starts from a checkpoint without the strategy's parameters, with
        the gate that was loaded. (In the latter case buffers, too, stay as they were built.)

        Args:
            gate: The backbone's gate.
        """
        return {}

    def logits(self, hidden: Tensor, modality_mask: Tensor, gate: BackboneGate) -> Tensor:
        """Returns the router's logits, [s, b, E], before the modality bias.

        Args:
            hidden: The router's input, [s, b, h].
            modality_mask: One-hot modalities, [s, b, M] bool.
            gate: The backbone's gate, a function from [s, b, h] to [s, b, E]; given further gates, it computes theirs
                too.
        """
        return gate(hidden)

    def choice_bias(self, modality_mask: Tensor) -> Tensor | None:
        """Returns what is added to the scores by which experts are chosen, [s, b, E]; None for no bias.

        The scores are those after softmax or sigmoid, between 0 and 1. The bias has no gradient and does not affect the
        weights of the chosen experts. A strategy that overrides this method sets `biases_choice` in its config. The
        bias must be the same in both passes of a recomputed layer, so state that it comes from may change only in
        `update`.

        Args:
            modality_mask: One-hot modalities, [s, b, M] bool.
        """
        return None

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns sums over this rank's tokens, by name; they join the layer's all-reduce and carry gradients."""
        return {}

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the layer's auxiliary losses, by metric name.

        Every rank that takes part in the reduction must return the same losses.
        """
        return {}

    def weight_losses(self, gate: Tensor, iteration: int) -> dict[str, AuxiliaryLoss]:
        """Returns losses that depend only on the router's weights, by metric name, each counted once per step.

        Strategy parameters that these losses depend on must be marked `sequence_parallel` if the layer is: only then
        does Megatron sum the parameters' gradients over the tensor-parallel ranks, each of which contributes a share.

        Args:
            gate: The backbone's router weight, [E, h].
            iteration: The step's number, from 0.
        """
        return {}

    def measures(self, routing: LayerRouting) -> dict[str, Weighted]:
        """Returns the weighted metrics of one micro-batch, by name."""
        return {}

    def accumulate(self, routing: LayerRouting) -> None:
        """Adds one micro-batch to what the strategy accumulates over a step, without gradients.

        Called once for each micro-batch and layer, in the pass with gradients, also under recomputation and in every
        virtual pipeline stage. It need not be saved: `update` runs before a checkpoint is saved. A strategy that
        overrides this method sets `keeps_state` in its config.
        """

    def step_sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns sums over this rank's tokens of a micro-batch that are needed once per step, without gradients.

        They are added up over the step's micro-batches, and reduced once per step, those of all layers in one
        all-reduce. A strategy that overrides this method sets `keeps_state` in its config.
        """
        return {}

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Updates the strategy's state once after each step.

        Called before the first micro-batch of the next step, or earlier when a checkpoint is saved.

        Args:
            sums: `step_sums` over all tokens of the step on all ranks.
        """


BALANCE_REMEDY = "balance with --moe-aux-loss-coeff"


@dataclass(frozen=True)
class StrategyConfig:
    """Settings of a strategy.

    Each field of a subclass is a flag, `--<name>-<field>`, whose help is its line of `Attributes`. A field that is not
    a flag has `metadata=NO_FLAG`.

    Attributes:
        name: The strategy's name in --modality-routing.
        title: One line of --help, after the name.
        metrics: The strategy's metrics, one for each loss and each measure.
        trains_modality_bias: Whether the modality bias is trained. It exists, at zero, under the other strategies too,
            so that the checkpoints of all stages have the same parameters (unless --no-modality-router-bias is given).
        of_a_run: Fields that cannot change when a run is resumed.
        of_inference: Fields that inference with a trained model needs; empty if inference needs only the backbone's
            routing, the modality bias and the gates per modality.
        collapse_remedy: What the warning about collapsing routing advises, with flags that the strategy accepts.
        needs_samples: Whether the strategy sums over the tokens of each sample (`RoutedTokens.sample_sums`).
        keeps_state: Whether the strategy accumulates statistics over steps. It is then refused with --smar-scope local,
            since the replicas would accumulate different statistics and a checkpoint stores only one replica's.
        training_state: Names of buffers that only training needs. They start anew if another strategy's checkpoint
            lacks them, and are not loaded when the run uses another strategy or none.
        biases_choice: Whether it has a `choice_bias`. Flags under which Megatron would ignore it are then refused, and
            nothing is accumulated while the router is frozen (--freeze): the bias is part of it.
        needs_experts: Whether the strategy has an effect only in MoE layers, so that a dense model is refused.
        gate_per_modality: Whether each modality has a gate of its own (`strategies.modality_gates.ModalityGates`),
            which an export then stores.
        exported: Whether the backbone's gate, the modality bias, the gates per modality and `allowed` are all that an
            export needs. If not, the export is refused and names the strategy.
        expert_axes: For each parameter and persistent buffer of the strategy's module, by name, the axis that counts
            the experts; None for one that has no such axis. When experts are moved to other places (placement), the
            state moves with them; a checkpoint with state that is not listed here is refused.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    trains_modality_bias: ClassVar[bool] = False
    of_a_run: ClassVar[tuple[str, ...]] = ()
    of_inference: ClassVar[tuple[str, ...]] = ()
    collapse_remedy: ClassVar[str] = BALANCE_REMEDY
    needs_samples: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    training_state: ClassVar[tuple[str, ...]] = ()
    biases_choice: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = True
    gate_per_modality: ClassVar[bool] = False
    exported: ClassVar[bool] = True
    expert_axes: ClassVar[Mapping[str, int | None]] = {}

    @property
    def needs_attention_scores(self) -> bool:
        """Whether soft modality scores are accumulated along the layers' attention (`model.layers.score_layer`).

        Only together with `needs_samples`.
        """
        return False

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return RoutingStrategy(self, layer)

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """Returns the experts that each modality's tokens may choose, [M, E] bool on the CPU; None for all experts.

        Args:
            layer: The layer's number, from 1.
            modalities: Names of the M modalities, by id.
            num_experts: E, the number of experts.

        Raises:
            ValueError: The settings do not fit these numbers.
        """
        return None

    def renumbered(
        self, orders: Mapping[int, Sequence[int]], modalities: Sequence[str], num_experts: int
    ) -> StrategyConfig:
        """Returns the settings for a model whose experts get other numbers; the same if they name no expert.

        Args:
            orders: For each MoE layer, by its number from 1, the present numbers of the experts that become 0, 1, ...
            modalities: Names of the M modalities, by id.
            num_experts: E, the number of experts.

        Raises:
            ValueError: The settings cannot describe the renumbered experts.
        """
        return self

    @classmethod
    def flag_fields(cls) -> list[Field[Any]]:
        """Returns the fields that are flags."""
        return [field for field in fields(cls) if field.metadata.get("flag", True)]

    @classmethod
    def flag(cls, field: str) -> str:
        """Returns the flag of a field."""
        return f"--{cls.name}_{field}".replace("_", "-")

    @classmethod
    def from_arguments(cls, args: Namespace) -> Self:
        """Builds the config from parsed flags."""
        return cls._of(vars(args), [field.name for field in cls.flag_fields()])

    @classmethod
    def from_checkpoint(cls, args: Namespace) -> Self:
        """Builds the config with the settings that inference with a trained model needs.

        Args:
            args: The run's flags, as its checkpoint stores them; a field missing in them has its default.
        """
        return cls._of(vars(args), cls.of_inference)

    @classmethod
    def _of(cls, args: Mapping[str, Any], names: Iterable[str]) -> Self:
        values = {name: args[f"{cls.name}_{name}"] for name in names if f"{cls.name}_{name}" in args}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @classmethod
    def default_flags(cls, args: Namespace, saved: Namespace | None) -> dict[str, Any]:
        """Returns flags that were not given and whose default depends on other flags, with their values.

        Args:
            args: The flags as given, before they are checked.
            saved: The arguments of the checkpoint that the run resumes from; None if it does not resume.
        """
        return {}

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks the settings against the run's other flags.

        Args:
            args: The parsed flags.
            moe_layers: Numbers of the model's MoE layers, from 1; None where a checkpoint gives the model's shape.

        Raises:
            ValueError: A setting cannot be used; the message gives the flag, its value and the fix.
        """

    @classmethod
    def check_unused(cls, args: Namespace) -> None:
        """Refuses this strategy's flags that would have no effect because another strategy is chosen.

        Raises:
            ValueError: Such a flag was given; the message names it.
        """
        for field in cls.flag_fields():
            value = getattr(args, f"{cls.name}_{field.name}", field.default)
            value = tuple(value) if isinstance(value, list) else value
            if value != field.default:
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{cls.flag(field.name)} {shown} has no effect with --modality-routing {args.modality_routing}; "
                    f"leave it out, or give --modality-routing {cls.name}."
                )

    def describe(self) -> str:
        """Returns a description of the strategy and its settings, no longer than half a line."""
        return f"{self.name}: {self.title}"
