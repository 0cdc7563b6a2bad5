# SPDX-License-Identifier: Apache-2.0
"""The backbone's own routing, measured. SMAR's loss is reported too, to compare runs with and without it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field, replace
from typing import Self

from megatron_smar.routing.strategies.base import NO_FLAG, RoutedLayer, StrategyConfig
from megatron_smar.routing.strategies.smar import Smar, SmarConfig


@dataclass(frozen=True)
class NoneConfig(StrategyConfig):
    """Settings of the backbone's own routing.

    Attributes:
        band: Settings of the SMAR loss that is reported but not added to the training loss.
    """

    name = "none"
    title = "the backbone's own routing, measured"
    metrics = SmarConfig.metrics
    needs_experts = False

    band: SmarConfig = field(default_factory=SmarConfig, metadata=NO_FLAG)

    @classmethod
    def from_arguments(cls, args: Namespace) -> Self:
        """Builds the config from parsed flags."""
        return cls(SmarConfig.from_arguments(args))

    def build(self, layer: RoutedLayer) -> Smar:
        """Builds the strategy's module for one layer."""
        return Smar(replace(self.band, acts=False), layer)
