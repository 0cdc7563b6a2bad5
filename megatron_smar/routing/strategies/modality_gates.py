# SPDX-License-Identifier: Apache-2.0
"""A gate for each modality over all experts (Ming-Omni, arXiv 2506.09344).

Modality m has a full gate of its own, g_m(x) = W_m x with W_m [E, h]. A token's logits are those of its modality's
gate; experts, dispatch and combination are shared.

Text's gate is the backbone's, so that a pretrained model's gate has its place and no parameter is unused. The gates of
the other modalities start equal to it, in a new model as well as in one loaded from a checkpoint with one gate: the
model starts as the pretrained one, and the gates drift apart with the gradients of their own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_smar.routing.strategies.base import (
    BackboneGate,
    GateWeights,
    RoutedLayer,
    RoutingStrategy,
    StrategyConfig,
)

# The axis that counts experts, for the gates of up to 16 modalities.
EXPERT_AXES: dict[str, int | None] = {
    f"gates.{modality}.{part}": 0 for modality in range(1, 16) for part in ("weight", "bias")
}


@dataclass(frozen=True)
class ModalityGatesConfig(StrategyConfig):
    """A gate for each modality has no settings: Megatron's --moe-router-load-balancing-type balances the experts."""

    name = "modality_gates"
    title = "each modality has its own gate over all experts (Ming-Omni)"
    gate_per_modality = True
    expert_axes = EXPERT_AXES
    collapse_remedy = "balance the experts: --moe-router-load-balancing-type aux_loss with --moe-aux-loss-coeff"

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return ModalityGates(self, layer)

    def describe(self) -> str:
        """Returns the strategy, in half a line."""
        return f"{self.name}: a gate per modality over all experts"


class Gate(nn.Module):
    """The gate of one modality, of the shape, data type and parallelism of the backbone's.

    Attributes:
        weight: [E, h].
        bias: [E], or None where the backbone's gate has none.
    """

    def __init__(self, layer: RoutedLayer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layer.num_experts, layer.hidden_size, dtype=layer.dtype))
        self.bias = nn.Parameter(torch.zeros(layer.num_experts, dtype=layer.dtype)) if layer.gate_bias else None
        for parameter in self.parameters():
            # Each tensor-parallel rank has its own shard of the sequence; Megatron sums the gradients of these.
            parameter.sequence_parallel = layer.sequence_parallel  # type: ignore[attr-defined]


class ModalityGates(RoutingStrategy):
    """The gates of one layer. Those of the modalities but text are `gates.1`, `gates.2`, ..., by the modality's id."""

    def __init__(self, config: StrategyConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        self.others = [Gate(layer) for _ in range(1, layer.num_modalities)]
        self.gates = nn.ModuleDict({str(modality): gate for modality, gate in enumerate(self.others, start=1)})

    def starts(self, gate: GateWeights) -> dict[str, Tensor]:
        """Returns the backbone's gate as the start of each modality's gate."""
        parts = {name: part for name, part in (("weight", gate.weight), ("bias", gate.bias)) if part is not None}
        return {f"gates.{modality}.{name}": part for modality in self.gates for name, part in parts.items()}

    def logits(self, hidden: Tensor, modality_mask: Tensor, gate: BackboneGate) -> Tensor:
        """Returns the logits of each token's own gate, [s, b, E]; padding, which has no modality, uses text's.

        One matrix product computes the logits of all gates: the number of tokens of a modality would have to be read
        from the device to compute only its own, and the product costs M E h of the several E h^2 of an MoE layer. A
        choice by `where` gives the other gates a gradient of exactly zero.
        """
        every = gate(hidden, *self.others).unflatten(-1, (self.layer.num_modalities, self.layer.num_experts))
        logits = every[..., 0, :]
        for modality in range(1, self.layer.num_modalities):
            logits = torch.where(modality_mask[..., modality, None], every[..., modality, :], logits)
        return logits.contiguous()  # `where` follows the mask, which Megatron has transposed
