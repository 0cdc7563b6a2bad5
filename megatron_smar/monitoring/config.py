# SPDX-License-Identifier: Apache-2.0
"""The config of routing monitoring: what is measured, and when."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from megatron_smar.modalities import Modalities
from megatron_smar.model.parts import frozen_parts
from megatron_smar.routing.strategies import STRATEGIES
from megatron_smar.routing.strategies.base import BALANCE_REMEDY, Metric

# The patches of one image are similar: 1,024 tokens are only four tiles of 256, and fewer are too few to judge.
LEAST_TOKENS = 1024


@dataclass(frozen=True)
class MonitorConfig:
    """The config of routing monitoring: what is measured, and when.

    Attributes:
        num_experts: E, the number of experts; a pipeline stage without MoE layers needs it to join the reduction.
        top_k: K, experts per token.
        modalities: Names of the M modalities, by id.
        scope: Scope of the routing statistics; with `local`, each data-parallel replica has its own.
        scalar_interval: Steps between points in TensorBoard and W&B.
        console_interval: Steps between lines on the console.
        capacity_limited: Whether tokens can be dropped (--moe-expert-capacity-factor).
        collapse_threshold: Share of a modality's tokens that choose one expert above which a warning is given. Even
            load is K / E. The largest possible share is 1, since a token chooses K different experts, so 1 switches the
            warning off.
        collapse_tokens: Fewest tokens of a modality in a console interval that the collapse warning judges.
        router_learns: Whether the router is trained; there is no collapse warning for a frozen router.
        collapse_remedy: What the collapse warning advises to do.
        metrics: The strategy's metrics.
    """

    num_experts: int = 1
    top_k: int = 1
    modalities: tuple[str, ...] = Modalities().names
    scope: Literal["global", "local"] = "global"
    scalar_interval: int = 1
    console_interval: int = 1
    capacity_limited: bool = False
    collapse_threshold: float = 0.9
    collapse_tokens: int = LEAST_TOKENS
    router_learns: bool = True
    collapse_remedy: str = BALANCE_REMEDY
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.collapse_threshold <= 1:
            raise ValueError(
                f"--moe-collapse-threshold is {self.collapse_threshold}; it is a share of a modality's tokens: "
                "give more than 0 and at most 1, which switches the warning off."
            )

    @classmethod
    def from_arguments(cls, args: Namespace) -> MonitorConfig:
        """Builds the config from Megatron's and this project's parsed flags."""
        writes = bool(args.tensorboard_dir or getattr(args, "wandb_project", ""))
        return cls(
            num_experts=args.num_experts or 1,
            top_k=args.moe_router_topk,
            modalities=Modalities(tuple(args.image_modalities)).names,
            scope=args.smar_scope,
            scalar_interval=args.tensorboard_log_interval if writes else args.log_interval,
            console_interval=args.log_interval,
            capacity_limited=args.moe_expert_capacity_factor is not None,
            collapse_threshold=args.moe_collapse_threshold,
            router_learns="router" not in frozen_parts(args.freeze),
            collapse_remedy=STRATEGIES[args.modality_routing].collapse_remedy,
            metrics=STRATEGIES[args.modality_routing].metrics,
        )
