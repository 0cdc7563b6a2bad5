# SPDX-License-Identifier: Apache-2.0
"""The configuration of modality-aware routing: what all strategies share, and the chosen strategy's own settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megatron_smar.modalities import Modalities
from megatron_smar.routing.strategies.base import StrategyConfig
from megatron_smar.routing.strategies.none import NoneConfig


@dataclass(frozen=True)
class ModalityRoutingConfig:
    """The configuration of modality-aware routing.

    Attributes:
        strategy: The strategy with its settings; one of `routing.strategies.STRATEGIES`.
        eps: Smoothing of the routing distributions; see `modality_routing_distribution`.
        scope: Tokens that the routing statistics cover. `global`: every token of the micro-batch step on all ranks;
            `local`: this data-parallel replica's micro-batch.
        router_bias: Whether each MoE layer has the modality bias b in R^{M x E}.
        modalities: The run's table of modalities.
    """

    strategy: StrategyConfig = field(default_factory=NoneConfig)
    eps: float = 1e-6
    scope: Literal["global", "local"] = "global"
    router_bias: bool = True
    modalities: Modalities = field(default_factory=Modalities)

    def __post_init__(self) -> None:
        if self.scope not in ("global", "local"):
            raise ValueError(f"--smar-scope is {self.scope!r}; it must be global or local.")
        if not self.eps > 0:
            raise ValueError(f"--smar-eps is {self.eps}; it must be greater than 0, or the distance can be infinite.")

    @property
    def num_modalities(self) -> int:
        """M, the number of modalities."""
        return len(self.modalities)

    def allowed(self, layer: int, num_experts: int) -> Tensor | None:
        """Returns the strategy's table of allowed experts, [M, E] bool on the CPU; None where all experts are allowed.

        Args:
            layer: The layer's number, from 1.
            num_experts: E, the number of experts.
        """
        return self.strategy.allowed(layer, self.modalities.names, num_experts)

    @property
    def trains_bias(self) -> bool:
        """Whether the modality bias exists and is trained."""
        return self.router_bias and self.strategy.trains_modality_bias
