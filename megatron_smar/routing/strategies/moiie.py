# SPDX-License-Identifier: Apache-2.0
"""MoIIE: experts of each modality and experts that all modalities share (arXiv 2508.09779).

The experts of a layer are a group per modality (intra-modality experts) and a shared group (inter-modality experts).
Each modality has its own gate over its group and the shared one; E_m is the number of these experts.

The balance loss of modality m's gate is the Switch Transformer's (arXiv 2101.03961, equations 4 to 6) over the experts
that its tokens may choose:

    L_m = E_m sum_e f_me P_me,   f_me = c_me / (K N_m),   P_me = 1 / N_m sum_t p_te

with c_me the number of modality m's N_m tokens that chose expert e, and p_te the router's score, which sums to 1 over
the token's experts. L_m is 1 where the load is even. The layer's loss is the sum of L_m over the modalities.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_smar.routing.strategies.balance import normalized_scores
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
from megatron_smar.routing.strategies.modality_gates import EXPERT_AXES, ModalityGates

MOIIE_LOSS = "moiie balance loss"
SHARED = "shared"
SCORES = ("softmax", "sigmoid")  # score functions with a finite gradient where an expert is forbidden


@dataclass(frozen=True)
class MoiieConfig(StrategyConfig):
    """Settings of MoIIE.

    Attributes:
        experts: The experts of each modality and the shared ones; each expert belongs to exactly one group. Given as
            numbers from 0, such as text=0-1 shared=2-5 vision=6-7, or as shares in this order, such as text=0.25
            shared=0.5 vision=0.25. Default: one half shared, and equal shares of the other half.
        coeff: Weight of the balance loss of each modality's gate (the paper: 0.001).
    """

    name = "moiie"
    title = "each modality has its own gate over its own and the shared experts (MoIIE)"
    metrics = (Metric(MOIIE_LOSS),)
    of_a_run: ClassVar[tuple[str, ...]] = ("experts", "coeff")
    of_inference: ClassVar[tuple[str, ...]] = ("experts",)
    gate_per_modality = True
    expert_axes = EXPERT_AXES
    collapse_remedy = "raise --moiie-coeff, or give the modality more experts with --moiie-experts"

    experts: tuple[str, ...] = ()
    coeff: float = 0.001

    def __post_init__(self) -> None:
        if not self.coeff >= 0:
            raise ValueError(f"--moiie-coeff is {self.coeff}; it must be 0 or more (the paper's is 0.001).")

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return Moiie(self, layer)

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """Returns the experts of each modality with the shared ones, [M, E] bool, the same in all layers."""
        if SHARED in modalities:
            raise ValueError(
                f"--image-modalities has {SHARED}, which in {self.flag('experts')} is the name of the experts that all "
                "modalities share: give the modality another name."
            )
        groups = self._groups(modalities, num_experts)
        table = torch.zeros(len(modalities), num_experts, dtype=torch.bool, device="cpu")
        for modality, name in enumerate(modalities):
            table[modality, groups[name] + groups[SHARED]] = True
        return table

    def renumbered(
        self, orders: Mapping[int, Sequence[int]], modalities: Sequence[str], num_experts: int
    ) -> MoiieConfig:
        """Returns the settings with the experts' new numbers, which must be the same in all layers."""
        groups = self._groups(modalities, num_experts)
        return replace(self, experts=renumbered_groups(groups, orders, self.flag("experts")) or self.experts)

    def _groups(self, modalities: Sequence[str], num_experts: int) -> dict[str, list[int]]:
        text, *images = modalities
        own = 0.5 / len(modalities)
        shares = {text: own, SHARED: 0.5, **dict.fromkeys(images, own)}
        return expert_groups(self.experts, shares, num_experts, self.flag("experts"), "group")

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks that the balance loss is defined for the router's scores."""
        if args.moe_router_score_function not in SCORES:
            raise ValueError(
                f"--moe-router-score-function {args.moe_router_score_function} has no finite gradient where "
                f"--modality-routing {self.name} forbids an expert; give {' or '.join(SCORES)}."
            )

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        experts = " ".join(self.experts) or "one half shared"
        return f"MoIIE: experts {experts}, coefficient {self.coeff:g}"


class Moiie(ModalityGates):
    """The gates of one layer and their balance losses."""

    config: MoiieConfig

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns the sums of the scores over each modality's tokens, N_m P_me, [M, E]."""
        scores = normalized_scores(tokens.logits, self.layer.score_function)
        return {"scores": tokens.modality_mask.to(scores.dtype).t() @ scores}

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the sum of the modalities' balance losses; a modality without tokens adds nothing."""
        assert routing.allowed is not None
        tokens = routing.statistics.tokens.clamp(min=1).unsqueeze(-1)
        load = routing.statistics.counts / (self.layer.top_k * tokens)
        scores = routing.sums["scores"] / tokens
        per_gate = routing.allowed.sum(dim=-1) * (load * scores).sum(dim=-1)
        return {MOIIE_LOSS: AuxiliaryLoss(per_gate.sum(), self.config.coeff)}
