# SPDX-License-Identifier: Apache-2.0
"""The trainable bias per modality and expert on the router's logits (SMAR, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ModalityBias(nn.Module):
    """The bias b in R^{M x E} of one MoE layer, zero at the start, always float32.

    Named `bias`, so that Megatron's optimizer gives it no weight decay.
    """

    def __init__(self, num_modalities: int, num_experts: int, trainable: bool, sequence_parallel: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_modalities, num_experts), requires_grad=trainable)
        # Each tensor-parallel rank sees its own shard of the sequence; Megatron sums the gradients of such parameters.
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        # Optimised as these are: in a group of its own, at the rate of --decoupled-lr, and never by Muon.
        self.bias.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModalityBias:
        """Moves as every module does, but a conversion to half precision leaves it in float32."""
        exact = self.bias.data
        super()._apply(fn, recurse)
        if torch.finfo(self.bias.dtype).bits < 32:
            self.bias.data = exact.to(self.bias.device)
        return self

    def forward(self, modality_mask: Tensor) -> Tensor:
        """The bias of each token, [..., E], from its one-hot modality [..., M]; padding gets 0."""
        return modality_mask.to(self.bias.dtype) @ self.bias
