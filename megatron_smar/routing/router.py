# SPDX-License-Identifier: Apache-2.0
"""Megatron's top-k router, extended by what the modalities need.

Three things are added and nothing else changes: a bias per modality on the logits (SMAR, Eq. 1 and 2), the routing
statistics with their one asynchronous reduction, and the auxiliary loss computed from them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_smar.routing.losses import layer_distance_and_loss
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics, statistics_from_mask

SMAR_LOSS = "smar loss"
MRD_DISTANCE = "mrd distance"
COMPARABLE = "mrd comparable"  # micro-batches with at least two modalities: the distance is averaged over these alone

StatisticsObserver = Callable[[int, RoutingStatistics], None]


@dataclass(frozen=True)
class ModalityRoutingConfig:
    """How the modalities take part in routing. The defaults are the paper's (its Table 7 and section 4.1).

    Attributes:
        strategy: `none` routes as the backbone does and only measures; `smar` adds the band loss.
        coeff: beta of Eq. 14.
        d_min: Lower end of the tolerance band (Eq. 13), in nats.
        d_max: Upper end of the tolerance band.
        bands: Bands of single layers, (d_min, d_max) by layer number from 1; the others have [d_min, d_max].
        start_iter: Steps before the loss begins to act.
        warmup_iters: Steps in which beta then rises linearly from 0; 0 begins with the whole of it.
        eps: Smoothing of the routing distributions; see `modality_routing_distribution`.
        scope: `global`: statistics over every token of the micro-batch step on all ranks. `local`: over this
            data-parallel replica's micro-batch.
        router_bias: Whether each MoE layer has the trainable bias b in R^{M x E}.
        num_modalities: M.
    """

    strategy: Literal["none", "smar"] = "none"
    coeff: float = 0.01
    d_min: float = 1.5
    d_max: float = 2.0
    bands: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    start_iter: int = 0
    warmup_iters: int = 0
    eps: float = 1e-6
    scope: Literal["global", "local"] = "global"
    router_bias: bool = True
    num_modalities: int = 2

    def __post_init__(self) -> None:
        if self.strategy not in ("none", "smar"):
            raise ValueError(f"--modality-routing is {self.strategy!r}; it must be none or smar.")
        if self.scope not in ("global", "local"):
            raise ValueError(f"--smar-scope is {self.scope!r}; it must be global or local.")
        if not 0 <= self.d_min <= self.d_max:
            raise ValueError(
                f"--smar-d-min {self.d_min} and --smar-d-max {self.d_max} are no band: "
                "give 0 <= d_min <= d_max (the paper's are 1.5 and 2.0)."
            )
        for layer, (d_min, d_max) in self.bands.items():
            if not 0 <= d_min <= d_max:
                raise ValueError(
                    f"--smar-band-file gives layer {layer} [{d_min}, {d_max}], which is no band: "
                    "give 0 <= d_min <= d_max."
                )
        for name in ("start_iter", "warmup_iters"):
            if getattr(self, name) < 0:
                raise ValueError(f"--smar-{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more.")
        if self.coeff < 0:
            raise ValueError(f"--smar-coeff is {self.coeff}; it must be 0 or more (the paper's is 0.01).")
        if not self.eps > 0:
            raise ValueError(f"--smar-eps is {self.eps}; it must be greater than 0, or the distance can be infinite.")
        if self.num_modalities < 2:
            raise ValueError(f"num_modalities is {self.num_modalities}; routing by modality needs at least 2.")

    def band(self, layer: int) -> tuple[float, float]:
        """The tolerance band (d_min, d_max) of a layer, by its number from 1."""
        return self.bands.get(layer, (self.d_min, self.d_max))

    def warmup(self, iteration: int) -> float:
        """The share of beta that acts in a step, counted from 0: none before `start_iter`, then a linear rise to 1."""
        steps = iteration - self.start_iter + 1
        return min(max(steps, 0) / max(self.warmup_iters, 1), 1.0)


class LossScale:
    """What the auxiliary loss of every layer is multiplied by in the step under way, beside beta.

    Constant within a step, so that recomputation and interleaved schedules read the same. Megatron keeps the loss
    scale of its own auxiliary losses in the same way (`MoEAuxLossAutoScaler`).

    Attributes:
        warmup: Share of beta, from `ModalityRoutingConfig.warmup`.
        tokens: For --calculate-per-token-loss, where Megatron adds up gradients over micro-batches and replicas and
            divides them by the step's loss tokens, while the auxiliary loss is to be averaged over micro-batches: the
            loss tokens per micro-batch step, over all replicas.
    """

    warmup: float = 1.0
    tokens: Tensor | None = None

    @classmethod
    def value(cls, is_global: bool, replicas: int, per_token: bool) -> float | Tensor:
        """`reductions` times the acting part of beta: what makes the gradient of the SMAR loss come out whole."""
        return cls.warmup * cls.reductions(is_global, replicas, per_token)

    @classmethod
    def reductions(cls, is_global: bool, replicas: int, per_token: bool) -> float | Tensor:
        """The factor that makes an auxiliary gradient come out whole after Megatron's reductions over `replicas`.

        Without per-token loss those average over the replicas, with it they add up. A loss that every replica shares
        (`is_global`) must then be multiplied by their number, or not; one of each replica's own must be averaged.
        """
        if not per_token:
            return replicas if is_global else 1
        if cls.tokens is None:
            raise RuntimeError(
                "--calculate-per-token-loss needs the number of loss tokens of a step before its first micro-batch: "
                "wrap the iterator in megatron_smar.training.batch.CountedSteps."
            )
        return cls.tokens / (1 if is_global else replicas)


class ModalityBias(nn.Module):
    """The trainable bias b in R^{M x E} of one MoE layer (Eq. 1, 2), zero at the start, always float32.

    Named `bias`, so that Megatron's optimizer gives it no weight decay.
    """

    def __init__(self, num_modalities: int, num_experts: int, trainable: bool, sequence_parallel: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_modalities, num_experts), requires_grad=trainable)
        # Each tensor-parallel rank sees its own shard of the sequence; Megatron sums the gradients of such parameters.
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        # Optimised as these are: in a group of its own, at the rate of --decoupled-lr, and never by Muon.
        self.bias.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModalityBias:
        """Moves as every module does, but a conversion to half precision leaves it in float32."""
        exact = self.bias.data
        super()._apply(fn, recurse)
        if torch.finfo(self.bias.dtype).bits < 32:
            self.bias.data = exact.to(self.bias.device)
        return self

    def forward(self, modality_mask: Tensor) -> Tensor:
        """The bias of each token, [..., E], from its one-hot modality [..., M]; padding gets 0."""
        return modality_mask.to(self.bias.dtype) @ self.bias


class ModalityAwareRouter(TopKRouter):
    """Top-k router that knows each token's modality.

    Takes Megatron's `padding_mask` argument as the one-hot modality mask [s, b, M] of `routing.modalities`. Top-K and
    the weights that combine the experts' outputs stay the backbone's own.

    The reduction of the statistics is launched here, before the tokens are dispatched; `finish` waits for it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        modality_routing: ModalityRoutingConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # Megatron's own dropping knows no padding: it happens here instead
            self.config = copy.copy(config)
            self.config.moe_expert_capacity_factor = None
        self.modality_routing = modality_routing
        self.modality_bias: ModalityBias | None = None
        if modality_routing.router_bias:
            trainable = modality_routing.strategy != "none"
            self.modality_bias = ModalityBias(
                modality_routing.num_modalities, self.num_experts, trainable, config.sequence_parallel
            )
        self.is_global = modality_routing.scope == "global"
        self.statistics_group = self.tp_dp_cp_group if self.is_global else self.tp_cp_group
        self.replicas = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        self.observers: list[StatisticsObserver] = []
        self._pending: PendingStatistics | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes as Megatron does, with the modality's bias on the logits, and launches the statistics' reduction.

        Args:
            logits: [s, b, E].
            padding_mask: The modality mask, [s, b, M] bool.

        Returns:
            probs [s * b, E] and routing_map [s * b, E], as Megatron's router.
        """
        modality_mask = padding_mask
        if modality_mask is None or modality_mask.dim() != 3:
            raise ValueError(
                "ModalityAwareRouter got no modality mask [s, b, M]; pass one as the language model's padding_mask "
                "(see megatron_smar.routing.modalities)."
            )
        if self.modality_bias is not None:
            logits = logits + self.modality_bias(modality_mask)
        padding = ~modality_mask.any(dim=-1)
        probs, routing_map = super().routing(logits, padding_mask=padding)
        if self.capacity_factor is not None:
            probs, routing_map = self._drop(probs, routing_map, padding.flatten())
        if self.observers or (self.training and torch.is_grad_enabled()):
            self._launch_statistics(probs, routing_map, modality_mask)
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Hangs the z-loss (ST-MoE, arXiv 2202.08906, Eq. 5) on the logits: its mean over the micro-batch's tokens.

        Megatron 0.19.2 averages the means of tensor- and context-parallel shards, which is another loss where they hold
        unequally many tokens.

        Args:
            logits: [N, E].
            padding_mask: [N] bool, True for padding.
        """
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares, number = torch.logsumexp(logits, dim=-1).square(), logits.new_tensor(logits.shape[0])
        if padding_mask is not None:
            squares, number = squares * ~padding_mask, (~padding_mask).sum().to(logits.dtype)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(number, group=self.tp_cp_group)
        z_loss = squares.sum() / number.clamp(min=1)  # this shard's part of the micro-batch's
        layers, layer = self._place()
        get_moe_metrics_tracker().record(
            "z_loss", (z_loss * self.tp_cp_group.size()).detach(), layer, layers, avg_group=self.tp_dp_cp_group
        )
        scale = LossScale.reductions(False, self.replicas, self.calculate_per_token_loss)
        return MoEAuxLossAutoScaler.apply(logits, z_loss * coeff * scale)

    def _drop(self, probs: Tensor, routing_map: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Drops what exceeds the experts' capacity (--moe-expert-capacity-factor); padding [N] takes no slot.

        The capacity is Megatron's, a share of all positions: their number is known without reading the device.
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

    def _launch_statistics(self, probs: Tensor, routing_map: Tensor, modality_mask: Tensor) -> None:
        """Sums equations 6 and 7 over this rank's tokens and launches their reduction; the host waits for nothing."""
        # Equation 5, whatever way the backbone normalises: softmax after or before top-k, sigmoid, scaled.
        weights = probs / probs.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        local = statistics_from_mask(weights, routing_map, modality_mask.flatten(0, 1))
        self._pending = PendingStatistics(local, self.statistics_group)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Counts per expert without padding: Megatron 0.19.2 combines [N, E] with [N], which needs one more axis.

        With a capacity the count comes after dropping, as Megatron's does: see `_drop`.
        """
        if self.capacity_factor is None:
            super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask.unsqueeze(-1))

    def finish(self, output: Tensor) -> Tensor:
        """Waits for the statistics, and hangs the layer's auxiliary loss on the layer's output.

        Args:
            output: [s, b, h], any tensor on the way to the loss.

        Returns:
            The same values; its backward pass adds the gradient of beta * SMAR loss (Eq. 14).
        """
        if self._pending is None:
            return output
        statistics, self._pending = self._pending.wait(), None
        for observer in self.observers:
            observer(self.layer_number, statistics)
        if not (self.training and torch.is_grad_enabled()):
            return output
        smar = self.modality_routing
        band = smar.band(self.layer_number)
        distance, loss, comparable = layer_distance_and_loss(statistics, self.topk, smar.eps, *band)
        self._record(statistics, {SMAR_LOSS: loss, MRD_DISTANCE: distance, COMPARABLE: comparable})
        if smar.strategy == "smar" and smar.coeff > 0:
            scale = LossScale.value(self.is_global, self.replicas, self.calculate_per_token_loss)
            output = MoEAuxLossAutoScaler.apply(output, loss * smar.coeff * scale)
        return output

    def _record(self, statistics: RoutingStatistics, values: dict[str, Tensor]) -> None:
        """Hands the layer's numbers to the tracker; global ones are the same on every rank already."""
        tracker: Any = get_moe_metrics_tracker()
        layers, layer = self._place()
        is_local = self.modality_routing.scope == "local"
        for name, value in values.items():
            tracker.record(name, value, layer, layers, needs_dp_avg=is_local)
        if hasattr(tracker, "record_statistics"):  # Megatron's own tracker, where no other is installed, takes scalars
            tracker.record_statistics(statistics, layer, layers)

    def _place(self) -> tuple[int, int]:
        """How many layers the metrics tracker has, and which of them this is, from 1."""
        layers = self.config.num_layers
        number = self.layer_number + (layers if self.is_mtp_layer else 0)
        return layers + (self.config.mtp_num_layers or 0), number
