# SPDX-License-Identifier: Apache-2.0
"""The routing of ERNIE 4.5-VL: experts of each modality, balanced within it (PaddlePaddle/ERNIE, ernie/moe/).

Each modality chooses among its own experts S_m, as in `hard`. ERNIE has a gate for each modality; the rows of one gate
that belong to the modality's experts are the same thing, since no token sees the other rows. Added to it are:

- a balance loss within each modality, c_m |S_m| sum_{e in S_m} f_{m,e} P_{m,e} (`balance`). As in ERNIE, f comes from
  the choice without the bias below. ERNIE does not divide its loss by K: c_m is K times its lambda.
- the router orthogonal loss on the gate's weights, once per step: for the rows w_e of each modality, normalized to
  length 1, the mean over |S_m|^2 entries of (W W^T - I)^2, added up over the modalities. ERNIE's trainer subtracts its
  gradient times the learning rate after the optimizer's step; here it is part of the optimizer's gradient.
- a bias on the choice of experts (auxiliary-loss-free balancing, arXiv 2408.15664), but not on their weights:
  b_e += rate * sign(mean load - load_e) with loads within the modality, of all ranks and micro-batches of the step. It
  is added to the scores after softmax (over S_m) or sigmoid. It moves once after each step. With a capacity limit the
  loads count what was executed. A modality without tokens, and a frozen router, keep their bias.

Left out: ERNIE's vision experts are a third as wide as its text experts; here all experts of a layer have one width.
Its z-loss is Megatron's --moe-z-loss-coeff, which is within a modality where the other experts' logits are -inf.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
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
)
from megatron_smar.routing.strategies.hard import HardConfig

ORTHOGONAL_LOSS = "router orthogonal loss"


@dataclass(frozen=True)
class ErnieConfig(HardConfig):
    """Settings of ERNIE 4.5-VL's routing.

    Attributes:
        experts: The experts of each modality, in the form of --hard-experts. Default: equal shares.
        balance_coeff: Weight of the balance loss, one number, or numbers by modality such as text=1e-4 vision=0; a
            modality that is left out is not balanced.
        orthogonal_coeff: Weight of the router orthogonal loss.
        bias_rate: Step of the bias on the choice of experts; with 0 there is no bias.
    """

    name = "ernie"
    title = "hard, with balance per modality by loss and bias, and an orthogonal gate (ERNIE 4.5-VL)"
    metrics = (Metric(BALANCE_LOSS), Metric(ORTHOGONAL_LOSS))
    of_a_run: ClassVar[tuple[str, ...]] = ("experts", "balance_coeff", "orthogonal_coeff", "bias_rate")
    of_inference: ClassVar[tuple[str, ...]] = ("experts", "bias_rate")
    collapse_remedy = "raise --ernie-balance-coeff or --ernie-bias-rate"
    keeps_state = True
    biases_choice = True
    expert_axes: ClassVar[Mapping[str, int | None]] = {"bias": 1}
    exported = False  # an export has no place for the bias on the choice

    balance_coeff: tuple[str, ...] = ("1e-4",)
    orthogonal_coeff: float = 1e-2
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        for field in ("orthogonal_coeff", "bias_rate"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{self.flag(field)} is {getattr(self, field)}; it must be 0 or more.")

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        """Builds the strategy's module for one layer."""
        return Ernie(self, layer)

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks the coefficients, and refuses Megatron's own balance loss and bias."""
        coefficients(self.flag("balance_coeff"), self.balance_coeff, Modalities(tuple(args.image_modalities)).names)
        check_balance(args, self.name)
        if args.moe_router_enable_expert_bias:
            raise ValueError(
                f"--moe-router-enable-expert-bias compares loads across modalities, and --modality-routing {self.name} "
                "has a bias that compares them within each; leave it out."
            )

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return (
            f"{super().describe()}, balance {' '.join(self.balance_coeff)}, orthogonal {self.orthogonal_coeff:g}, "
            f"bias rate {self.bias_rate:g}"
        )


class Ernie(RoutingStrategy):
    """The losses and the bias of one layer.

    Attributes:
        own: The experts of each modality, [M, E] bool.
        bias: The bias on the choice of experts, [M, E]; 0 for experts of other modalities.
        load: Tokens of each modality that chose each expert in this step, [M, E]; 0 whenever a checkpoint is saved.
    """

    config: ErnieConfig
    own: Tensor
    bias: Tensor
    load: Tensor

    def __init__(self, config: ErnieConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        own = config.allowed(1, layer.modalities, layer.num_experts)  # the same in all layers
        assert own is not None
        self.coefficients = coefficients(config.flag("balance_coeff"), config.balance_coeff, layer.modalities)
        self.register_buffer("own", own, persistent=False)
        self.register_buffer("bias", torch.zeros(own.shape))
        self.register_buffer("load", torch.zeros(own.shape), persistent=False)

    def choice_bias(self, modality_mask: Tensor) -> Tensor | None:
        """Returns the bias of each token's modality, [s, b, E]; 0 for padding."""
        return modality_mask.to(self.bias.dtype) @ self.bias if self.config.bias_rate else None

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns the choices and the scores of each modality and expert."""
        return balance_sums(tokens, self.layer.top_k, self.layer.score_function)

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the sum of the modalities' balance losses, each with its coefficient."""
        losses = balance_losses(routing.sums, routing.statistics.tokens, self.layer.top_k, self.own.sum(dim=1))
        return {BALANCE_LOSS: AuxiliaryLoss(weighted_sum(losses, self.coefficients), 1.0)}

    def weight_losses(self, gate: Tensor, iteration: int) -> dict[str, AuxiliaryLoss]:
        """Returns the router orthogonal loss, the sum over the modalities."""
        rows = F.normalize(gate.to(torch.promote_types(gate.dtype, torch.float32)), dim=1, eps=1e-12)
        own = self.own.to(rows.dtype)
        squares = (rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square()
        means = torch.einsum("me,ef,mf->m", own, squares, own) / own.sum(dim=1).square()
        return {ORTHOGONAL_LOSS: AuxiliaryLoss(means.sum(), self.config.orthogonal_coeff)}

    def accumulate(self, routing: LayerRouting) -> None:
        """Adds the loads of a micro-batch, over all ranks."""
        self.load += routing.statistics.counts

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Raises the bias of the experts below their modality's mean load, and lowers it of those above."""
        mean = self.load.sum(dim=1, keepdim=True) / self.own.sum(dim=1, keepdim=True)
        self.bias += self.config.bias_rate * (mean - self.load).sign() * self.own
        self.load.zero_()
