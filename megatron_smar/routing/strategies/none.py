# SPDX-License-Identifier: Apache-2.0
"""The backbone's own routing, measured: SMAR's loss too, so that runs with and without it can be compared."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field, replace
from typing import Self

from megatron_smar.routing.strategies.base import NO_FLAG, RoutedLayer, StrategyConfig
from megatron_smar.routing.strategies.smar import Smar, SmarConfig


@dataclass(frozen=True)
class NoneConfig(StrategyConfig):
    """Routes as the backbone does.

    Attributes:
        band: Of the SMAR loss that is reported and does not act.
    """

    name = "none"
    title = "the backbone's own routing, measured"
    metrics = SmarConfig.metrics
    needs_experts = False

    band: SmarConfig = field(default_factory=SmarConfig, metadata=NO_FLAG)

    @classmethod
    def from_arguments(cls, args: Namespace) -> Self:
        """The config that parsed flags ask for."""
        return cls(SmarConfig.from_arguments(args))

    def build(self, layer: RoutedLayer) -> Smar:
        """The strategy of one layer."""
        return Smar(replace(self.band, coeff=0.0), layer)
