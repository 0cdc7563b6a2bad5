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
    """Loss of one micro-batch in the form that Megatron's schedules expect.

    Megatron divides the sum by the number, and averages gradients over replicas and context-parallel ranks. With this
    rank's number that is the mean of the means of a sequence's shares; with the number of all shares, and the sum times
    the number of ranks, it is the mean over the micro-batch's tokens, as one process has it.

    Args:
        loss_mask: [b, s], this context-parallel rank's share.
        shares: What is logged beside the loss: name -> [part, whole].
        check_for_nan: Whether Megatron runs the step of a loss that is not finite again, to tell data from hardware.
            Such a step is never applied, whatever this is (`runtime.finite_steps`).
        output_tensor: [b, s], cross-entropy per token.
        context_tokens: Tokens of the micro-batch that count, over all context-parallel ranks, []; None where Megatron
            adds up over these ranks before it divides (--calculate-per-token-loss) or there is one.
        context_parallel_size: How many context-parallel ranks there are.

    Returns:
        The sum over the tokens that count, their number, and what is logged: this rank's sum and number, which Megatron
        adds up over micro-batches and ranks before dividing.
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
