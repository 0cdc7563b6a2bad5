# SPDX-License-Identifier: Apache-2.0
"""Balance of the experts' load within each modality, with a coefficient per modality (LTDR, arXiv 2507.01351).

LTDR balances text tokens only: the load of vision tokens is long-tailed, and evening it out harms them. That part of
LTDR is the default here, a coefficient of 0 for every modality but text. With M coefficients c_m the loss of a layer is

    L = sum_m c_m E sum_e f_{m,e} P_{m,e}

where f_{m,e} is the share of the K choices of modality m's tokens that expert e gets, and P_{m,e} the mean over these
tokens of the softmax over all E experts (with sigmoid scores: of the scores divided by their sum, as in Megatron's
aux_loss). Both are over the tokens of all ranks in the micro-batch step, without padding. A modality without tokens
adds nothing. With only text in a batch of one replica, L is c_text times Megatron's aux_loss.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_smar.modalities import Modalities
from megatron_smar.routing.strategies.balance import (
    BALANCE_LOSS,
    balance_losses,
    balance_sums,
    check_balance,
    coefficients,
    weighted_sum,
)
from megatron_smar.routing.strategies.base import (
    AuxiliaryLoss,
    LayerRouting,
    Metric,
    RoutedLayer,
    RoutedTokens,
    RoutingStrategy,
    StrategyConfig,
)


@dataclass(frozen=True)
class ModalityBalanceConfig(StrategyConfig):
    """Settings of the balance loss per modality.

    Attributes:
        coeff: Weight of each modality's balance loss, such as text=0.01 vision=0; a modality that is left out is not
            balanced. One number is for all modalities.
    """

    name = "modality_balance"
    title = "a balance loss with one coefficient per modality (LTDR: text only)"
    metrics = (Metric(BALANCE_LOSS),)
    of_a_run: ClassVar[tuple[str, ...]] = ("coeff",)
    collapse_remedy = "raise the modality's --modality-balance-coeff"

    coeff: tuple[str, ...] = ("text=0.01",)

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return ModalityBalance(self, layer)

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks the coefficients' form and the modalities that they name, and refuses Megatron's own balance loss."""
        coefficients(self.flag("coeff"), self.coeff, Modalities(tuple(args.image_modalities)).names)
        check_balance(args, self.name)

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return f"{self.name}: coefficients {' '.join(self.coeff)}"


class ModalityBalance(RoutingStrategy):
    """The balance losses of one layer."""

    config: ModalityBalanceConfig

    def __init__(self, config: ModalityBalanceConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        self.coefficients = coefficients(config.flag("coeff"), config.coeff, layer.modalities)

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns the choices and the scores of each modality and expert."""
        return balance_sums(tokens, self.layer.top_k, self.layer.score_function)

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the sum of the modalities' losses, each with its coefficient."""
        layer = self.layer
        losses = balance_losses(routing.sums, routing.statistics.tokens, layer.top_k, layer.num_experts)
        return {BALANCE_LOSS: AuxiliaryLoss(weighted_sum(losses, self.coefficients), 1.0)}
