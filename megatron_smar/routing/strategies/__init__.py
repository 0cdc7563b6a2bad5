# SPDX-License-Identifier: Apache-2.0
"""The routing strategies, one file each, built on the interface in `base`; a new strategy is a file and a line here.

`balance` is no strategy, but a loss that several of them use.
"""

from argparse import Namespace

from megatron_smar.routing.strategies.base import RoutedLayer, RoutingStrategy, StrategyConfig
from megatron_smar.routing.strategies.ernie import ErnieConfig
from megatron_smar.routing.strategies.hard import HardConfig
from megatron_smar.routing.strategies.label_ce import LabelCeConfig
from megatron_smar.routing.strategies.layer_split import LayerSplitConfig
from megatron_smar.routing.strategies.modality_balance import ModalityBalanceConfig
from megatron_smar.routing.strategies.modality_gates import ModalityGatesConfig
from megatron_smar.routing.strategies.moiie import MoiieConfig
from megatron_smar.routing.strategies.none import NoneConfig
from megatron_smar.routing.strategies.smar import SmarConfig
from megatron_smar.routing.strategies.smoes import SmoesConfig

STRATEGIES: dict[str, type[StrategyConfig]] = {
    config.name: config
    for config in (
        NoneConfig,
        SmarConfig,
        SmoesConfig,
        HardConfig,
        LayerSplitConfig,
        ModalityGatesConfig,
        MoiieConfig,
        LabelCeConfig,
        ModalityBalanceConfig,
        ErnieConfig,
    )
}


def stored_strategy(args: Namespace) -> StrategyConfig:
    """Returns a trained model's strategy, with the settings needed to run it; `none` if the flags name no strategy.

    Args:
        args: The run's flags, as its checkpoint stores them.

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
