# SPDX-License-Identifier: Apache-2.0
"""The training step under way, as the routers of a model see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TrainingStep:
    """What is constant within a training step: recomputation and interleaved schedules read the same values.

    A model has one, which its forward step sets and its routers read.

    Attributes:
        iteration: Number of the step, from 0.
        tokens: Loss tokens per micro-batch step, over all replicas. Needed with --calculate-per-token-loss, where
            Megatron adds up gradients over micro-batches and replicas and divides them by the step's loss tokens, while
            an auxiliary loss is to be averaged over micro-batches.
    """

    iteration: int = 0
    tokens: Tensor | None = None

    def reductions(self, is_global: bool, replicas: int, per_token: bool) -> float | Tensor:
        """The factor that makes an auxiliary gradient whole after Megatron's reductions over data-parallel replicas.

        Without per-token loss Megatron averages over the replicas, with it it adds up.

        Args:
            is_global: Whether every replica computes the same loss, from all replicas' tokens.
            replicas: Their number.
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
