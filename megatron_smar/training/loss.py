# SPDX-License-Identifier: Apache-2.0
"""The main loss: cross-entropy over the tokens that the loss mask keeps, as a mean or as a weighted mean."""

from __future__ import annotations

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

LM_LOSS = "lm loss"


def lm_loss(
    loss_mask: Tensor,
    shares: dict[str, Tensor],
    check_for_nan: bool,
    output_tensor: Tensor,
    *,
    context_tokens: Tensor | None = None,
    context_parallel_size: int = 1,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Computes the loss of one micro-batch in the form that Megatron's schedules expect.

    Megatron divides the sum by the number of tokens, and averages gradients over replicas and context-parallel ranks.
    With this rank's number of tokens, that would be the mean of the means of a sequence's shares. With the number of
    tokens of all shares, and the sum multiplied by the number of ranks, it is the mean over the micro-batch's tokens,
    as in one process.

    Args:
        loss_mask: This context-parallel rank's share of the loss mask, [b, s].
        shares: What is logged in addition to the loss: name -> [part, total].
        check_for_nan: Whether Megatron reruns a step whose loss is not finite, to distinguish a data error from a
            hardware error. Such a step is never applied, whatever this value is (`runtime.finite_steps`).
        output_tensor: Cross-entropy per token, [b, s].
        context_tokens: Loss tokens of the micro-batch over all context-parallel ranks, []; None without context
            parallelism, or where Megatron sums over these ranks before it divides (--calculate-per-token-loss).
        context_parallel_size: Number of context-parallel ranks.

    Returns:
        The sum over the loss tokens, their number, and what is logged: this rank's sum and number, which Megatron sums
        over micro-batches and ranks before dividing.
    """
    total, number = _sums(loss_mask, output_tensor, check_for_nan)
    logged = {LM_LOSS: torch.stack([total.detach(), number]), **shares}
    if context_tokens is not None:
        total, number = total * context_parallel_size, context_tokens
    return total, number.detach().int(), logged


def weighted_lm_loss(
    loss_weights: Tensor,
    shares: dict[str, Tensor],
    check_for_nan: bool,
    output_tensor: Tensor,
    *,
    step_weight: Tensor,
    ranks: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Computes one micro-batch's part of sum(w * loss) / sum(w) over the whole step (--loss-weighting).

    Megatron divides what is returned by its number of tokens and by the number of micro-batches, and averages gradients
    over replicas and context-parallel ranks. The number is 1 here, and the sum is multiplied by the number of these
    ranks and divided by sum(w) per micro-batch: what remains is the division by sum(w).

    Args:
        loss_weights: This context-parallel rank's share of the weights w, [b, s]; 0 where the loss does not count.
        shares: As for `lm_loss`.
        check_for_nan: As for `lm_loss`.
        output_tensor: Cross-entropy per token, [b, s].
        step_weight: Sum of the weights of the step, over all replicas, divided by the number of micro-batches per
            replica, [].
        ranks: Number of ranks over which Megatron averages: replicas times context-parallel ranks.

    Returns:
        As `lm_loss`. Logged are this rank's sum of w * loss and of w, so that what Megatron logs is what is minimized.
    """
    total, weight = _sums(loss_weights, output_tensor, check_for_nan)
    logged = {LM_LOSS: torch.stack([total.detach(), weight]), **shares}
    # Without loss tokens in the step all weights are 0, and so is the loss.
    divisor = step_weight.where(step_weight > 0, 1.0)
    return total * ranks / divisor, torch.ones_like(weight, dtype=torch.int), logged


def _sums(weights: Tensor, output_tensor: Tensor, check_for_nan: bool) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the losses and the sum of the weights, [] each; Megatron may rerun the step."""
    weights = weights.flatten().float()
    total = (output_tensor.flatten().float() * weights).sum()
    if check_for_nan:
        # One check for both, since each waits for the device; the error shows the value.
        get_rerun_state_machine().validate_result(
            result=total, rejection_func=_is_not_finite, message="found NaN or Inf in the lm loss", fatal=True
        )
    return total, weights.sum()


def _is_not_finite(value: Tensor) -> Tensor:
    return ~value.isfinite()
