# SPDX-License-Identifier: Apache-2.0
"""Label cross-entropy: a loss that draws each modality's tokens to experts set by hand, while routing stays free.

This is Flex-MoE's loss (arXiv 2410.08245) as SMAR's related work describes it for modalities: a cross-entropy between
the router's probability mass on a modality's experts and the token's label, its modality. The papers leave the details
open, and Flex-MoE's code has one expert for each combination of modalities, noise and a loss that balances; here, for
token i of modality m(i), router logits z_i and the set of experts S_m,

    L = mean_i -log sum_{e in S_m(i)} softmax(z_i)_e

The softmax is over all E experts, also where the backbone has sigmoid scores, which are no distribution. The mean is
over the tokens of all ranks in the micro-batch step, of every modality and without padding, so a modality weighs as
much as it has tokens. Padding alone has no loss. L is 0 where each token puts all its mass on its modality's experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_smar.modalities import Modalities
from megatron_smar.routing.strategies.base import (
    AuxiliaryLoss,
    LayerRouting,
    Metric,
    RoutedLayer,
    RoutedTokens,
    RoutingStrategy,
    StrategyConfig,
)
from megatron_smar.routing.strategies.expert_groups import expert_groups, renumbered_groups

LABEL_LOSS = "label loss"


@dataclass(frozen=True)
class LabelCeConfig(StrategyConfig):
    """Settings of the label cross-entropy.

    Attributes:
        experts: The experts to which each modality is drawn, in the form of --hard-experts. Default: equal shares.
        coeff: Weight of the loss.
    """

    name = "label_ce"
    title = "cross-entropy between a token's modality and the mass on its experts (Flex-MoE)"
    metrics = (Metric(LABEL_LOSS),)
    of_a_run: ClassVar[tuple[str, ...]] = ("experts", "coeff")

    experts: tuple[str, ...] = ()
    coeff: float = 0.01

    def __post_init__(self) -> None:
        if not self.coeff >= 0:
            raise ValueError(f"{self.flag('coeff')} is {self.coeff}; it must be 0 or more.")

    def groups(self, modalities: Sequence[str], num_experts: int) -> dict[str, list[int]]:
        """Returns the numbers of each modality's experts, by name, in the order of the modalities' ids.

        Args:
            modalities: Names of the M modalities, by id.
            num_experts: E, the number of experts.

        Raises:
            ValueError: The settings do not fit these numbers, or leave a modality without experts.
        """
        equal = dict.fromkeys(modalities, 1 / len(modalities))
        groups = expert_groups(self.experts, equal, num_experts, self.flag("experts"), "modality")
        for name, own in groups.items():
            if not own:
                raise ValueError(
                    f"{self.flag('experts')} {' '.join(self.experts) or '(equal shares)'} leaves {name} none of the "
                    f"{num_experts} experts, so its loss would be infinite; give it at least one."
                )
        return groups

    def renumbered(
        self, orders: Mapping[int, Sequence[int]], modalities: Sequence[str], num_experts: int
    ) -> LabelCeConfig:
        """Returns the settings with the experts' new numbers, which must be the same in all layers."""
        groups = self.groups(modalities, num_experts)
        return replace(self, experts=renumbered_groups(groups, orders, self.flag("experts")) or self.experts)

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return LabelCe(self, layer)

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks that the experts fit the model."""
        if moe_layers and args.num_experts:
            self.groups(Modalities(tuple(args.image_modalities)).names, args.num_experts)

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return f"{self.name}: experts {' '.join(self.experts) or 'in equal shares'}, coefficient {self.coeff:g}"


class LabelCe(RoutingStrategy):
    """The label cross-entropy of one layer."""

    config: LabelCeConfig
    order: Tensor

    def __init__(self, config: LabelCeConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        groups = config.groups(layer.modalities, layer.num_experts).values()
        self.sizes = [len(own) for own in groups]
        order = [number for own in groups for number in own]
        self.register_buffer("order", torch.tensor(order), persistent=False)  # experts by modality

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns the sum of the tokens' losses; logarithms of sums, so that no small mass is rounded to 0."""
        logits = tokens.logits.to(torch.promote_types(tokens.logits.dtype, torch.float32))
        groups = logits.index_select(1, self.order).split(self.sizes, dim=1)
        masses = torch.stack([group.logsumexp(dim=1) for group in groups], dim=1)  # log of each modality's mass, [N, M]
        losses = masses.logsumexp(dim=1, keepdim=True) - masses
        return {"label": (losses * tokens.modality_mask).sum()}

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the mean of the tokens' losses."""
        mean = routing.sums["label"] / routing.statistics.tokens.sum().clamp(min=1)
        return {LABEL_LOSS: AuxiliaryLoss(mean, self.config.coeff)}
