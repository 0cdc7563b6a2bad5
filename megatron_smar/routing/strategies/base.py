# SPDX-License-Identifier: Apache-2.0
"""What a routing strategy can do; the router does everything else, the same for all of them.

A strategy is one file with a config, which knows its flags, its checks and what it reports, and a module, of which each
MoE layer has one:

    gate -> logits -> modality bias -> allowed -> Megatron's top-k -> sums -> one all-reduce -> losses
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from megatron_smar.routing.statistics import RoutingStatistics

NO_FLAG: Mapping[str, Any] = {"flag": False}  # metadata of a config's field that is no flag


@dataclass(frozen=True)
class Metric:
    """A number of each MoE layer that a strategy reports.

    Attributes:
        name: On the console, and in TensorBoard and W&B. That of a loss ends in "loss", by which Megatron tells what to
            average over micro-batches.
        weighted: False for a loss, which is reported as the main loss is: the mean over steps on the console, the
            step's value elsewhere. True for a measure: a mean over micro-batches, each with its own weight.
        on_console: Whether a measure's mean over the layers is in the console's line; losses always are.

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
    """The MoE layer that a strategy routes.

    Attributes:
        num_experts: E.
        top_k: K, experts per token.
        hidden_size: h.
        num_modalities: M.
        sequence_parallel: Whether each tensor-parallel rank sees its own shard of the sequence.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    num_modalities: int
    sequence_parallel: bool = False


class RoutedTokens(NamedTuple):
    """This rank's tokens of a micro-batch, after the choice of experts.

    Attributes:
        logits: [N, E], with the modality bias; -inf for experts that a token's modality may not choose (`allowed`).
        weights: [N, E], top-k weights renormalised over the chosen experts (SMAR, Eq. 5), 0 where not chosen.
        routing_map: [N, E] bool, the chosen experts.
        modality_mask: [N, M] bool, one-hot; False everywhere for padding.
    """

    logits: Tensor
    weights: Tensor
    routing_map: Tensor
    modality_mask: Tensor


class LayerRouting(NamedTuple):
    """How one layer routed a micro-batch, over all ranks that take part in the reduction.

    Attributes:
        number: The layer's number, from 1.
        iteration: The step's, from 0.
        statistics: Counts, weights and tokens per modality.
        sums: The strategy's own, by name.
        distance: MRD distance, a scalar.
        comparable: 1 where at least two modalities have tokens, else 0, and then the distance is 0 too.
    """

    number: int
    iteration: int
    statistics: RoutingStatistics
    sums: Mapping[str, Tensor]
    distance: Tensor
    comparable: Tensor


class AuxiliaryLoss(NamedTuple):
    """A loss of one layer and micro-batch.

    Attributes:
        value: A scalar, as it is reported. Factors for replicas, micro-batches and tokens are the router's business.
        coefficient: What it is multiplied by in this step; with 0 it is reported only.
    """

    value: Tensor
    coefficient: float


class Weighted(NamedTuple):
    """A metric's value in one layer and micro-batch, and its weight in the mean, both scalars."""

    value: Tensor
    weight: Tensor


class RoutingStrategy(nn.Module):
    """What one MoE layer does with the modalities. A strategy overrides what it needs.

    Parameters and persistent buffers are saved in checkpoints, under `router.strategy`. Buffers, which hold statistics
    of many steps, stay in the precision they were made in when the model is converted to half precision.

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

    def logits(self, hidden: Tensor, modality_mask: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The router's logits, [s, b, E], before the modality bias.

        Args:
            hidden: The router's input, [s, b, h].
            modality_mask: [s, b, M] bool.
            gate: The backbone's own, [s, b, h] to [s, b, E].
        """
        return gate(hidden)

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Sums over this rank's tokens, by name, which join the layer's one all-reduce; gradients pass through them."""
        return {}

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """The layer's auxiliary losses, by the name of their metric; the same on all ranks."""
        return {}

    def weight_losses(self, gate: Tensor, iteration: int) -> dict[str, AuxiliaryLoss]:
        """Losses of the router's weights alone, by the name of their metric, each counted once per step.

        Parameters of the strategy that they depend on must be marked `sequence_parallel` where the layer is: only then
        does Megatron add up their gradients over the tensor-parallel ranks, each of which gives a share.

        Args:
            gate: The backbone's router weight, [E, h].
            iteration: The step's, from 0.
        """
        return {}

    def measures(self, routing: LayerRouting) -> dict[str, Weighted]:
        """The weighted metrics of one micro-batch, by name."""
        return {}

    def accumulate(self, routing: LayerRouting) -> None:
        """Adds one micro-batch to the strategy's state, without gradients; its config has `keeps_state`."""

    def update(self) -> None:
        """Updates the strategy's state from what was accumulated in the step before.

        Called at the start of each step and of each run, so that what was accumulated is part of the state: with
        nothing accumulated it must change nothing.
        """


@dataclass(frozen=True)
class StrategyConfig:
    """Settings of a strategy. Each field of a subclass is a flag, `--<name>-<field>`, with its line of `Attributes`.

    A field that is no flag has `metadata=NO_FLAG`.

    Attributes:
        name: What --modality-routing calls it.
        title: One line of --help, after the name.
        metrics: What it reports: one for each loss and each measure.
        trains_modality_bias: Whether the modality bias learns. It exists, at zero, under the others too, so that the
            checkpoints of a run's stages have one shape.
        of_a_run: Fields that a run cannot change when it resumes.
        of_inference: Fields without which a trained model cannot be run; none where routing then is the backbone's own
            with the modality bias.
        collapse_remedy: What the warning of collapsing routing advises to do with its flags.
        keeps_state: Whether the strategy accumulates statistics over steps. With --smar-scope local the replicas would
            accumulate different ones, of which a checkpoint holds one: refused.
        needs_experts: Whether it has something to do in MoE layers alone, so that a dense model is refused.
        exported: Whether the backbone's gate, the modality bias and `allowed` are all that an export needs. Else it is
            refused by name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    trains_modality_bias: ClassVar[bool] = False
    of_a_run: ClassVar[tuple[str, ...]] = ()
    of_inference: ClassVar[tuple[str, ...]] = ()
    collapse_remedy: ClassVar[str] = ""
    keeps_state: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = True
    exported: ClassVar[bool] = True

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """The strategy of one layer."""
        return RoutingStrategy(self, layer)

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """The experts that tokens of each modality may choose, [M, E] bool on the CPU; None for all.

        Args:
            layer: The layer's number, from 1.
            modalities: Names of the M modalities, by id.
            num_experts: E.

        Raises:
            ValueError: The settings do not fit these numbers.
        """
        return None

    @classmethod
    def flag_fields(cls) -> list[Field[Any]]:
        """The fields that are flags."""
        return [field for field in fields(cls) if field.metadata.get("flag", True)]

    @classmethod
    def flag(cls, field: str) -> str:
        """The flag of a field."""
        return f"--{cls.name}_{field}".replace("_", "-")

    @classmethod
    def from_arguments(cls, args: Namespace) -> Self:
        """The config that parsed flags ask for."""
        return cls._of(vars(args), [field.name for field in cls.flag_fields()])

    @classmethod
    def from_checkpoint(cls, args: Namespace) -> Self:
        """The config as far as a trained model needs it to be run.

        Args:
            args: The run's, as its checkpoint stores them; a field that they lack has its default.
        """
        return cls._of(vars(args), cls.of_inference)

    @classmethod
    def _of(cls, args: Mapping[str, Any], names: Iterable[str]) -> Self:
        values = {name: args[f"{cls.name}_{name}"] for name in names if f"{cls.name}_{name}" in args}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks what only all flags together show.

        Args:
            args: As parsed.
            moe_layers: Numbers of the model's MoE layers, from 1; None where a checkpoint gives the model's shape.

        Raises:
            ValueError: With the flag, its value and the fix.
        """

    @classmethod
    def check_unused(cls, args: Namespace) -> None:
        """Refuses flags that have no effect, where another strategy is chosen.

        Raises:
            ValueError: With the flag.
        """

    def describe(self) -> str:
        """The strategy and its settings, in half a line."""
        return f"{self.name}: {self.title}"
