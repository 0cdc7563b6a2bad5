# SPDX-License-Identifier: Apache-2.0
"""Masks the rows by which Megatron pads the vocabulary for a parallel layout, so that their probability is 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _WithoutPadding(torch.autograd.Function):
    """Sets all logits from one column on to the lowest number of their dtype, in place: their probability is exactly 0.

    Not to minus infinity: on a rank that holds only padding, fused kernels would subtract it from itself, giving NaN.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        """Returns logits [..., columns] with the columns from `first` on masked."""
        ctx.mark_dirty(logits)
        logits[..., first:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient on: in masked columns cross-entropy's gradient is their probability, exactly 0 anyway."""
        return gradients[0], None


def mask_padding(output_layer: nn.Module, vocab_size: int, padded_size: int, group: dist.ProcessGroup) -> None:
    """Makes an output layer give the rows after the vocabulary no probability, in training and in evaluation.

    Losses and gradients then do not depend on the padding.

    Args:
        output_layer: GPTModel's output layer, which returns (logits [s, b, vocabulary / tp or vocabulary], bias).
        vocab_size: Number of tokens in the vocabulary.
        padded_size: Number of rows of all ranks together, with padding.
        group: Tensor-parallel group, whose ranks hold the rows in the order of the ranks.
    """

    def without_padding(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        logits, *rest = outputs
        columns = logits.shape[-1]
        begin = 0 if columns == padded_size else group.rank() * columns
        first = max(0, vocab_size - begin)
        return (_WithoutPadding.apply(logits, first), *rest) if first < columns else None

    if vocab_size < padded_size:
        output_layer.register_forward_hook(without_padding)
