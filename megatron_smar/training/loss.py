# SPDX-License-Identifier: Apache-2.0
"""The main loss: cross-entropy over the tokens that the loss mask keeps."""

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
    mask = loss_mask.flatten().float()
    total = (output_tensor.flatten().float() * mask).sum()
    number = mask.sum()
    if check_for_nan:
        # One check for both, since each waits for the device; the error shows the value.
        get_rerun_state_machine().validate_result(
            result=total, rejection_func=_is_not_finite, message="found NaN or Inf in the lm loss", fatal=True
        )
    logged = {LM_LOSS: torch.stack([total.detach(), number.detach()]), **shares}
    if context_tokens is not None:
        total, number = total * context_parallel_size, context_tokens
    return total, number.detach().int(), logged


def _is_not_finite(value: Tensor) -> Tensor:
    return ~value.isfinite()
