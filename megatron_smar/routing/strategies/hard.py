# SPDX-License-Identifier: Apache-2.0
"""Hard routing: separate experts for each modality (Mono-InternVL, arXiv 2410.08202; MoMa, arXiv 2407.21770)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_smar.routing.strategies.base import StrategyConfig
from megatron_smar.routing.strategies.expert_groups import expert_groups, renumbered_groups


@dataclass(frozen=True)
class HardConfig(StrategyConfig):
    """Settings of hard routing.

    Attributes:
        experts: The experts of each modality; each expert belongs to exactly one modality. Given as numbers from 0,
            such as text=0-3 vision=4-7 or text=0,2-5 vision=1,6,7, or as shares in order, such as text=0.75
            vision=0.25. Default: equal shares.
    """

    name = "hard"
    title = "each modality has its own experts (Mono-InternVL, MoMa)"
    of_a_run: ClassVar[tuple[str, ...]] = ("experts",)
    of_inference: ClassVar[tuple[str, ...]] = ("experts",)

    experts: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return f"{self.name}: experts {' '.join(self.experts) or 'in equal shares'}"

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """Returns the experts of each modality, [M, E] bool, the same in all layers."""
        return membership(self._groups(modalities, num_experts), num_experts)

    def renumbered(
        self, orders: Mapping[int, Sequence[int]], modalities: Sequence[str], num_experts: int
    ) -> HardConfig:
        """Returns the settings with the experts' new numbers, which must be the same in all layers."""
        layers = {n: order for n, order in orders.items() if self.allowed(n, modalities, num_experts) is not None}
        groups = self._groups(modalities, num_experts)
        return replace(self, experts=renumbered_groups(groups, layers, self.flag("experts")) or self.experts)

    def _groups(self, modalities: Sequence[str], num_experts: int) -> dict[str, list[int]]:
        equal = dict.fromkeys(modalities, 1 / len(modalities))
        return expert_groups(self.experts, equal, num_experts, self.flag("experts"), "modality")


def membership(groups: Mapping[str, Sequence[int]], num_experts: int) -> Tensor:
    """Returns the experts of each modality, [M, E] bool on the CPU.

    Args:
        groups: The numbers of each modality's experts, by name, in the order of the modalities' ids.
        num_experts: E, the number of experts.
    """
    table = torch.zeros(len(groups), num_experts, dtype=torch.bool, device="cpu")
    for modality, numbers in enumerate(groups.values()):
        table[modality, numbers] = True
    return table
