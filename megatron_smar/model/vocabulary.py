# SPDX-License-Identifier: Apache-2.0
"""The rows by which Megatron pads the vocabulary for a layout are no tokens: they take no part in any probability."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _WithoutPadding(torch.autograd.Function):
    """Sets the logits from one column on to the lowest number there is, in place: their probability is exactly 0.

    Not minus infinity: a rank that holds nothing but padding would subtract it from itself in fused kernels.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        """Logits [..., columns] with those from `first` on taken out."""
        ctx.mark_dirty(logits)
        logits[..., first:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The cross-entropy's gradient is a column's probability, and so exactly 0 there already."""
        return gradients[0], None


def mask_padding(output_layer: nn.Module, vocab_size: int, padded_size: int, group: dist.ProcessGroup) -> None:
    """Has an output layer give no probability to rows behind the vocabulary, in training and in evaluation.

    Whatever the padding then is, losses and gradients are those of the vocabulary alone.

    Args:
        output_layer: GPTModel's, which gives (logits [s, b, vocabulary / tp or all of it], bias).
        vocab_size: Tokens.
        padded_size: Rows of all ranks together.
        group: The tensor-parallel ranks, which have the rows in their order.
    """

    def without_padding(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        logits, *rest = outputs
        columns = logits.shape[-1]
        begin = 0 if columns == padded_size else group.rank() * columns
        first = max(0, vocab_size - begin)
        return (_WithoutPadding.apply(logits, first), *rest) if first < columns else None

    if vocab_size < padded_size:
        output_layer.register_forward_hook(without_padding)
