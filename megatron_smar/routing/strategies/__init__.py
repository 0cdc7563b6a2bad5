# SPDX-License-Identifier: Apache-2.0
"""The routing strategies, each in a file of its own on the hook of `base`; a new one is a file and a line here."""

from argparse import Namespace

from megatron_smar.routing.strategies.base import RoutedLayer, RoutingStrategy, StrategyConfig
from megatron_smar.routing.strategies.hard import HardConfig
from megatron_smar.routing.strategies.layer_split import LayerSplitConfig
from megatron_smar.routing.strategies.none import NoneConfig
from megatron_smar.routing.strategies.smar import SmarConfig

STRATEGIES: dict[str, type[StrategyConfig]] = {
    config.name: config for config in (NoneConfig, SmarConfig, HardConfig, LayerSplitConfig)
}


def stored_strategy(args: Namespace) -> StrategyConfig:
    """The strategy of a trained model, as far as it is needed to run it; `none` where nothing is said of one.

    Args:
        args: The run's, as its checkpoint stores them.

    Raises:
        ValueError: This version does not know the strategy.
    """
    name = getattr(args, "modality_routing", "none")
    if name not in STRATEGIES:
        raise ValueError(
            f"the checkpoint was trained with --modality-routing {name}, and this version knows "
            f"{', '.join(STRATEGIES)}; take the version that trained it."
        )
    return STRATEGIES[name].from_checkpoint(args)


__all__ = ["STRATEGIES", "RoutedLayer", "RoutingStrategy", "StrategyConfig", "stored_strategy"]
