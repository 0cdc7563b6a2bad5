# SPDX-License-Identifier: Apache-2.0
"""The current training step, as the routers of a model see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class AccumulatingRouter(Protocol):
    """A router whose strategy accumulates statistics over a step."""

    statistics_group: dist.ProcessGroup

    def take_step_sums(self) -> dict[str, Tensor]:
        """Returns this rank's sums of the step, by name, and starts new ones."""
        ...

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Updates the strategy's state with the sums over all ranks."""
        ...


@dataclass
class TrainingStep:
    """State of the current training step, of which each model has one instance.

    The forward step sets `iteration` and `tokens`, which are constant within the step, so that recomputed and
    interleaved passes read the same values.

    Attributes:
        iteration: Number of the step, from 0.
        tokens: Loss tokens of the step, over all replicas, divided by the number of micro-batches per replica. Needed
            with --calculate-per-token-loss, where Megatron sums gradients over micro-batches and replicas and divides
            them by the step's loss tokens, while an auxiliary loss must be averaged over micro-batches.
        samples: The largest number of samples in a micro-batch so far. A micro-batch with fewer gets sums of 0 for the
            rest.
        routers: Routers whose strategies have accumulated statistics since the last `settle`.
    """

    iteration: int = 0
    tokens: Tensor | None = None
    samples: int = 1
    routers: dict[AccumulatingRouter, None] = field(default_factory=dict)
    _begun: int | None = None

    def begin(self) -> None:
        """Settles the previous step when the first router runs in a new one."""
        if self._begun != self.iteration:
            self._begun = self.iteration
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Reduces what the routers have accumulated, in one all-reduce for all layers, and updates their strategies.

        Called before the first micro-batch of the next step and when a checkpoint is saved, whichever comes first, on
        all ranks that hold replicas of these routers. Does nothing if nothing was accumulated.
        """
        routers, self.routers = list(self.routers), {}
        own = [router.take_step_sums() for router in routers]
        parts = [part for sums in own for part in sums.values()]
        if parts:
            packed = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(packed, group=routers[0].statistics_group)
            totals = iter(packed.split([part.numel() for part in parts]))
            own = [{name: next(totals).view_as(part) for name, part in sums.items()} for sums in own]
        for router, sums in zip(routers, own, strict=True):
            router.update(sums)

    def discard(self) -> None:
        """Forgets what the routers have accumulated in a step that is not applied."""
        for router in self.routers:
            router.take_step_sums()
        self.routers = {}

    def reductions(self, is_global: bool, replicas: int, per_token: bool) -> float | Tensor:
        """Returns the factor that corrects an auxiliary loss for Megatron's reductions over data-parallel replicas.

        Without per-token loss Megatron averages gradients over the replicas; with it, Megatron sums them and divides
        them by the step's loss tokens. The factor is, with T = `tokens`:

        |                    | without per-token loss | with per-token loss |
        |--------------------|------------------------|---------------------|
        | `is_global`        | replicas               | T                   |
        | not `is_global`    | 1                      | T / replicas        |

        Args:
            is_global: Whether every replica computes the same loss, from all replicas' tokens, so that the replicas'
                gradients must be summed. If not, each replica has its own loss, and their gradients must be averaged.
            replicas: Number of data-parallel replicas.
            per_token: Whether --calculate-per-token-loss is given.

        Raises:
            RuntimeError: `tokens` is needed and was not set.
        """
        if not per_token:
            return replicas if is_global else 1
        if self.tokens is None:
            raise RuntimeError(
                "--calculate-per-token-loss needs the number of loss tokens of a step before its first micro-batch: "
                "wrap the iterator in megatron_smar.training.batch.CountedSteps."
            )
        return self.tokens / (1 if is_global else replicas)
