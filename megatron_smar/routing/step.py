# SPDX-License-Identifier: Apache-2.0
"""The current training step, as the routers of a model see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TrainingStep:
    """Values that are constant within a training step, so that recomputed and interleaved passes read the same values.

    Each model has one instance, which the forward step sets and the model's routers read.

    Attributes:
        iteration: Number of the step, from 0.
        tokens: Loss tokens of the step, over all replicas, divided by the number of micro-batches per replica. Needed
            with --calculate-per-token-loss, where Megatron sums gradients over micro-batches and replicas and divides
            them by the step's loss tokens, while an auxiliary loss must be averaged over micro-batches.
    """

    iteration: int = 0
    tokens: Tensor | None = None

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
