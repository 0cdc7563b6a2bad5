# SPDX-License-Identifier: Apache-2.0
"""The main loss: cross-entropy over the tokens that the loss mask keeps."""

from __future__ import annotations

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

LM_LOSS = "lm loss"


def lm_loss(
    loss_mask: Tensor, shares: dict[str, Tensor], check_for_nan: bool, output_tensor: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch in the form that Megatron's schedules expect.

    Args:
        loss_mask: [b, s].
        shares: What is logged beside the loss: name -> [part, whole].
        check_for_nan: Whether a loss that is not finite stops the run, with the rank and the device named.
        output_tensor: [b, s], cross-entropy per token.

    Returns:
        The sum over the tokens that count, their number, and what is logged: sum and number again, which Megatron adds
        up over micro-batches and ranks before dividing.
    """
    mask = loss_mask.flatten().float()
    total = (output_tensor.flatten().float() * mask).sum()
    number = mask.sum()
    if check_for_nan:
        # One check for both, since each waits for the device; the error shows the value.
        get_rerun_state_machine().validate_result(
            result=total, rejection_func=_is_not_finite, message="found NaN or Inf in the lm loss", fatal=True
        )
    return total, number.detach().int(), {LM_LOSS: torch.stack([total.detach(), number.detach()]), **shares}


def _is_not_finite(value: Tensor) -> Tensor:
    return ~value.isfinite()
