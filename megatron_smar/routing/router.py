# SPDX-License-Identifier: Apache-2.0
"""Megatron's top-k router with modality-aware routing.

The strategy defines how the modalities affect the logits, the choice of experts and the losses (`strategies.base`). The
router does what is the same for all strategies: it applies the strategy, adds the modality bias (SMAR, Eq. 1 and 2),
sums the routing statistics with one asynchronous all-reduce per micro-batch, and attaches the auxiliary losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smar.routing.choice import BiasedChoice
from megatron_smar.routing.closed_form import distance_in_few_operations, packed_statistics, renormalized
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.modality_bias import ModalityBias
from megatron_smar.routing.samples import TokensOfSamples
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics
from megatron_smar.routing.step import TrainingStep
from megatron_smar.routing.strategies.base import (
    AuxiliaryLoss,
    GateWeights,
    LayerRouting,
    RoutedLayer,
    RoutedTokens,
    RoutingStrategy,
    Weighted,
)

MRD_DISTANCE = "mrd distance"


@dataclass(frozen=True)
class RoutingReport:
    """What a layer reports for one micro-batch.

    Attributes:
        layer: The layer's number, from 1; multi-token prediction layers follow the others.
        num_layers: The number of layers, multi-token prediction layers included.
        statistics: Routing statistics over all ranks that take part in the reduction.
        losses: The strategy's losses by name; empty in passes without gradients (evaluation, and the first of the two
            passes of a recomputed layer).
        measures: The strategy's weighted metrics and the MRD distance, by name; empty in passes without gradients.
    """

    layer: int
    num_layers: int
    statistics: RoutingStatistics
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Weighted] = field(default_factory=dict)


Observer = Callable[[RoutingReport], None]


class AttachLoss(torch.autograd.Function):
    """Megatron's `MoEAuxLossAutoScaler` for a loss with a factor, in one operation instead of seven."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, factor: float | Tensor) -> Tensor:
        """Returns the output; `loss`, a scalar, gets the gradient `factor` times Megatron's scale of the main loss."""
        ctx.factor, ctx.loss_dtype, ctx.device = factor, loss.dtype, loss.device
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Returns the output's gradient unchanged, and the loss's."""
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is None:
            scale = torch.ones((), device=ctx.device)
        return gradient, (scale * ctx.factor).to(ctx.loss_dtype).view(()), None


class ModalityAwareRouter(TopKRouter):
    """Top-k router that knows each token's modality.

    Megatron's `padding_mask` argument carries the one-hot modality mask [s, b, M] of `routing.modalities`. The top-k
    choice and the weights that combine the experts' outputs remain the backbone's.

    The router launches the all-reduce of the statistics before the tokens are dispatched; `finish` waits for it.

    Args:
        config: Megatron's TransformerConfig.
        pg_collection: Megatron's process groups.
        is_mtp_layer: Whether the router belongs to a multi-token prediction layer.
        modality_routing: The configuration of modality-aware routing.
        step: The model's training step, shared by its routers; by default this router creates one for itself.
    """

    allowed: Tensor | None
    expert_bias: Tensor | None
    router_replay: Any

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        modality_routing: ModalityRoutingConfig,
        step: TrainingStep | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # Megatron's dropping does not know padding: `_drop` replaces it
            self.config = copy.copy(config)
            self.config.moe_expert_capacity_factor = None
        self.modality_routing = modality_routing
        self.step = step or TrainingStep()
        # The backbone's softmax over the chosen experts is SMAR's Eq. 5 already, with the same derivative: dividing by
        # the sum, 1, would subtract the same number from the gradients of a token's experts, and softmax does so too.
        self.sums_to_one = (
            config.moe_router_score_function == "softmax"
            and not config.moe_router_pre_softmax
            and config.moe_router_topk_scaling_factor is None
            and self.capacity_factor is None
        )
        modalities, parallel = modality_routing.num_modalities, config.sequence_parallel
        self.modality_bias: ModalityBias | None = None
        if modality_routing.router_bias:
            self.modality_bias = ModalityBias(modalities, self.num_experts, modality_routing.trains_bias, parallel)
        self.strategy = modality_routing.strategy.build(
            RoutedLayer(
                num_experts=self.num_experts,
                top_k=self.topk,
                hidden_size=config.hidden_size,
                modalities=modality_routing.modalities.names,
                sequence_parallel=parallel,
                dtype=config.params_dtype,
                gate_bias=self.bias is not None,
                score_function=config.moe_router_score_function,
            )
        )
        # Only a strategy that overrides `sums` or `step_sums` needs `RoutedTokens`.
        own = type(self.strategy)
        self.sums_tokens = own.sums is not RoutingStrategy.sums or own.step_sums is not RoutingStrategy.step_sums
        with torch.no_grad():
            for name, value in self.strategy.starts(self).items():
                self.strategy.get_parameter(name).copy_(value)
        self._lacking: frozenset[str] = frozenset()  # names of the strategy's weights that the checkpoint lacks
        self.register_buffer("allowed", None, persistent=False)
        self.is_global = modality_routing.scope == "global"
        self.statistics_group = self.tp_dp_cp_group if self.is_global else self.tp_cp_group
        self.replicas = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        self.observers: list[Observer] = []  # called in training, in passes with gradients only
        self.recorders: list[Observer] = []  # called in every pass, with or without gradients
        self._modality_mask: Tensor | None = None
        self._hidden: Tensor | None = None
        self._pending: PendingStatistics | None = None
        self.sample_ids: Tensor | None = None  # of the pass that is about to run, [s, b]; set by the MoE layer
        self.scores: Tensor | None = None  # soft modality scores of that pass, [s, b, M]
        self._step_sums: dict[str, Tensor] = {}  # this rank's, since the strategy's last update

    def set_layer_number(self, layer_number: int) -> None:
        """Sets the layer's number, from 1, on which the allowed experts may depend."""
        super().set_layer_number(layer_number)
        self.allowed = self.modality_routing.allowed(layer_number, self.num_experts)

    def start_without(self, names: Iterable[str]) -> None:
        """Makes the next loading of a checkpoint leave out weights of the strategy, which start as in a new model.

        Args:
            names: Names of the parameters and buffers of `strategy` that the checkpoint lacks.
        """
        self._lacking = frozenset(names)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns what Megatron saves and loads, without what the checkpoint to load lacks."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
        return {
            name: part for name, part in state.items() if name.removeprefix(f"{prefix}strategy.") not in self._lacking
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads a state dict; what the checkpoint lacks starts from the gate that is loaded, or stays as it is."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        own, starts = self.strategy.state_dict(), self.strategy.starts(self)
        for name in self._lacking:  # torch loads them into the strategy next
            state_dict[f"{prefix}strategy.{name}"] = starts.get(name, own[name])
        self._lacking = frozenset()

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes as Megatron does, with the strategy's logits.

        Args:
            input: Hidden states [s, b, h].
            padding_mask: The modality mask, [s, b, M] bool.

        Returns:
            probs [s * b, E] and routing_map [s * b, E], as Megatron's router returns them.

        Raises:
            ValueError: `padding_mask` is not a modality mask.
        """
        if padding_mask is None or padding_mask.dim() != 3:
            raise ValueError(
                "ModalityAwareRouter got no modality mask; pass one, [b, s, M], as the language model's "
                "padding_mask (see megatron_smar.routing.modalities)."
            )
        if self.training:
            self.step.begin()
        self._modality_mask = padding_mask  # Megatron does not pass it to `gating`
        self._hidden = input
        routed = super().forward(input, padding_mask)
        self._hidden = None
        return routed

    def gating(self, input: Tensor) -> Tensor:
        """Returns the strategy's logits [s, b, E] for the router's input [s, b, h]."""
        assert self._modality_mask is not None
        return self.strategy.logits(input, self._modality_mask, self._gate)

    def _gate(self, hidden: Tensor, *others: GateWeights) -> Tensor:
        """Returns the logits of the backbone's gate and of others in one matrix product; see `BackboneGate`."""
        if not others:
            return super().gating(hidden)
        gates: tuple[GateWeights, ...] = (self, *others)
        bias = None if self.bias is None else torch.cat([gate.bias for gate in gates if gate.bias is not None])
        # Megatron's function reads these three attributes only.
        stacked = SimpleNamespace(weight=torch.cat([gate.weight for gate in gates]), bias=bias, config=self.config)
        return TopKRouter.gating(stacked, hidden)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses experts as Megatron does, with the modality's bias and allowed experts; launches the all-reduce.

        Args:
            logits: Router logits [s, b, E].
            padding_mask: The modality mask, [s, b, M] bool.

        Returns:
            probs [s * b, E] and routing_map [s * b, E], as Megatron's router returns them.
        """
        assert padding_mask is not None
        modality_mask = padding_mask
        # The modalities as factors of matrix products, at least in float32 as the modality bias is. The mask is a
        # transposed view; the cast makes it contiguous.
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        one_hot = modality_mask.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        if self.modality_bias is not None:
            logits = self.modality_bias(logits, one_hot)
        real = modality_mask.any(dim=-1)
        padding = ~real
        with self._choosing(logits, modality_mask) as logits:
            probs, routing_map = super().routing(logits, padding_mask=padding)
        if self.capacity_factor is not None:
            probs, routing_map = self._drop(probs, routing_map, padding.flatten())
        if self._learns() or self.recorders:
            probs = self._launch_statistics(logits, probs, routing_map, modality_mask, one_hot, real)
        return probs, routing_map

    @contextmanager
    def _choosing(self, logits: Tensor, modality_mask: Tensor) -> Iterator[Tensor]:
        """Applies the strategy's `choice_bias` and allowed experts to Megatron's choice; padding may choose any expert.

        The logit of an expert that a token's modality may not choose becomes -inf. Its sigmoid score is 0, which a bias
        on the choice (the strategy's, or Megatron's expert bias) could raise above other scores, so its bias becomes
        -inf too. The weights of the chosen experts come from the logits alone.
        """
        bias = self.strategy.choice_bias(modality_mask)
        if self.allowed is not None:
            # A one-hot product with a table of -inf would give 0 * -inf = NaN, so the table holds zeros and ones.
            forbidden = (modality_mask.to(torch.float32) @ (~self.allowed).to(torch.float32)) > 0
            logits = logits.masked_fill(forbidden, -torch.inf)
            if bias is not None or self.expert_bias is not None:
                bias = torch.where(forbidden, -torch.inf, 0.0 if bias is None else bias)
        replay = self.router_replay
        if bias is not None:
            by_logits = self.score_function == "softmax" and not self.config.moe_router_pre_softmax
            self.router_replay = BiasedChoice(bias.flatten(0, 1), by_logits)
        try:
            yield logits
        finally:
            self.router_replay = replay

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attaches the z-loss (ST-MoE, arXiv 2202.08906, Eq. 5), a mean over the micro-batch's tokens, to the logits.

        Megatron 0.19.2 averages the means of the tensor- and context-parallel shards, which gives a different loss
        where the shards have different numbers of tokens without padding.

        Args:
            logits: Router logits [N, E].
            padding_mask: [N] bool, True for padding.
        """
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self._learns():
            return logits
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # counts above 256 are not bf16 numbers
        squares, number = torch.logsumexp(exact, dim=-1).square(), exact.new_tensor(logits.shape[0])
        if padding_mask is not None:
            squares, number = squares * ~padding_mask, (~padding_mask).sum().to(exact.dtype)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(number, group=self.tp_cp_group)
        z_loss = squares.sum() / number.clamp(min=1)  # this shard's part of the micro-batch's z-loss
        layers, layer = self._place()
        get_moe_metrics_tracker().record(
            "z_loss", (z_loss * self.tp_cp_group.size()).detach(), layer, layers, avg_group=self.tp_dp_cp_group
        )
        scale = self.step.reductions(False, self.replicas, self.calculate_per_token_loss)
        return MoEAuxLossAutoScaler.apply(logits, z_loss * coeff * scale)

    def _drop(self, probs: Tensor, routing_map: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Drops tokens beyond the experts' capacity (--moe-expert-capacity-factor); padding [N] uses no slot.

        As in Megatron, the capacity is computed from the number of all positions, padding included, which is known
        without a device synchronization.
        """
        taken = ~padding.unsqueeze(-1)
        probs, routing_map = apply_router_token_dropping(
            probs * taken,
            routing_map & taken,
            router_topk=self.topk,
            capacity_factor=self.capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
        )
        super()._apply_expert_bias(routing_map)
        return probs, routing_map

    def _launch_statistics(
        self, logits: Tensor, probs: Tensor, routing_map: Tensor, modality_mask: Tensor, one_hot: Tensor, real: Tensor
    ) -> Tensor:
        """Computes this rank's sums for SMAR's Eq. 6 and 7 and launches the all-reduce, without blocking the host.

        Returns:
            The probabilities that the backbone uses; their values are unchanged.
        """
        # SMAR, Eq. 5, for any weights of the backbone: softmax before or after top-k, sigmoid, with a scaling factor.
        weights = probs if self.sums_to_one else renormalized(probs)
        weights, local, packed = packed_statistics(weights, routing_map, one_hot, real.view(-1, 1))
        sums = {}
        if self.sums_tokens and self._learns():
            assert self._hidden is not None
            tokens = RoutedTokens(
                self._hidden.detach().flatten(0, 1),
                logits.flatten(0, 1),
                weights,
                routing_map,
                modality_mask.flatten(0, 1),
                None if self.scores is None else self.scores.flatten(0, 1),
                self._sample_sums(),
            )
            sums = self.strategy.sums(tokens)
            with torch.no_grad():
                for name, part in self.strategy.step_sums(tokens).items():
                    self._step_sums[name] = self._step_sums[name] + part if name in self._step_sums else part
        self._pending = PendingStatistics(local, self.statistics_group, sums, packed)
        return weights if self.sums_to_one else probs

    def _sample_sums(self) -> TokensOfSamples | None:
        if self.sample_ids is None:
            return None
        return TokensOfSamples(self.sample_ids.flatten(), self.step.samples, self.tp_cp_group)

    def take_step_sums(self) -> dict[str, Tensor]:
        """Returns this rank's sums of the step (`RoutingStrategy.step_sums`), and starts new ones."""
        sums, self._step_sums = self._step_sums, {}
        return sums

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Updates the strategy's state after a step; called by `TrainingStep.settle`."""
        self.strategy.update(sums)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Counts tokens per expert, without padding, for the update of Megatron's expert bias.

        Megatron 0.19.2 would combine the routing map [N, E] with a padding mask [N]; here the mask is [N, 1]. With a
        capacity limit the tokens are counted after dropping, as in Megatron: see `_drop`.
        """
        if self.capacity_factor is None:
            super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask.unsqueeze(-1))

    def finish(self, output: Tensor) -> Tensor:
        """Waits for the statistics, and attaches the layer's auxiliary losses to the layer's output.

        Args:
            output: [s, b, h], any tensor that the loss depends on.

        Returns:
            A tensor with the same values, whose backward pass adds the gradients of the losses (SMAR: Eq. 14).
        """
        if self._pending is None:
            return output
        (statistics, sums), self._pending = self._pending.wait(), None
        layers, layer = self._place()
        if not self._learns():
            self._report(RoutingReport(layer, layers, statistics), self.recorders)
            return output
        distance, comparable = distance_in_few_operations(statistics, self.topk, self.modality_routing.eps)
        routing = LayerRouting(
            self.layer_number, self.step.iteration, statistics, sums, distance, comparable, self.allowed
        )
        losses, own = self.strategy.losses(routing), self.strategy.weight_losses(self.weight, self.step.iteration)
        measures = {MRD_DISTANCE: Weighted(distance, comparable)} | self.strategy.measures(routing)
        strategy = self.modality_routing.strategy
        # A bias on the choice is part of the router: it does not move while the router is frozen.
        if strategy.keeps_state and (self.weight.requires_grad or not strategy.biases_choice):
            with torch.no_grad():
                self.strategy.accumulate(routing)
            self.step.routers[self] = None
        values = {name: loss.value for name, loss in (losses | own).items()}
        self._report(RoutingReport(layer, layers, statistics, values, measures), self.observers + self.recorders)
        output = self._attach(output, losses, self.is_global)
        # Every rank computes a loss of the weights in full, and the ranks' gradients are summed.
        return self._attach(output, own, True, self.tp_dp_cp_group.size())

    def _attach(self, output: Tensor, losses: Mapping[str, AuxiliaryLoss], is_global: bool, parts: int = 1) -> Tensor:
        """Attaches losses to the output, whose backward pass then adds their gradients, each divided by `parts`."""
        for loss in losses.values():
            if loss.coefficient != 0:
                scale = self.step.reductions(is_global, self.replicas, self.calculate_per_token_loss)
                output = AttachLoss.apply(output, loss.value, scale * (loss.coefficient / parts))
        return output

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @staticmethod
    def _report(report: RoutingReport, observers: Sequence[Observer]) -> None:
        for observer in observers:
            observer(report)

    def _place(self) -> tuple[int, int]:
        """Returns the number of layers in the metrics tracker, and this layer's number among them, from 1."""
        layers = self.config.num_layers
        number = self.layer_number + (layers if self.is_mtp_layer else 0)
        return layers + (self.config.mtp_num_layers or 0), number
