# SPDX-License-Identifier: Apache-2.0
"""The trainable bias per modality and expert that is added to the router's logits (SMAR, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ModalityBias(nn.Module):
    """The bias b in R^{M x E} of one MoE layer, initialized to zero, always float32.

    The parameter is named `bias` so that Megatron's optimizer applies no weight decay to it.
    """

    def __init__(self, num_modalities: int, num_experts: int, trainable: bool, sequence_parallel: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_modalities, num_experts), requires_grad=trainable)
        # Each tensor-parallel rank has its own shard of the sequence; Megatron sums the gradients of such parameters.
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        # Optimized like an embedding: in a separate parameter group, with --decoupled-lr, and never by Muon.
        self.bias.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModalityBias:
        """Applies `fn` as every module does, but stays in float32 when the model is converted to half precision."""
        exact = self.bias.data
        super()._apply(fn, recurse)
        if torch.finfo(self.bias.dtype).bits < 32:
            self.bias.data = exact.to(self.bias.device)
        return self

    def forward(self, logits: Tensor, one_hot: Tensor) -> Tensor:
        """Returns the logits plus the bias of each token's modality (Eq. 1 and 2), in one operation.

        Args:
            logits: Router logits, [s, b, E].
            one_hot: One-hot modalities, [s * b, M], float; all 0 for padding, which has no bias. Its data type is that
                of the result.
        """
        dtype = one_hot.dtype
        return torch.addmm(logits.flatten(0, 1).to(dtype), one_hot, self.bias.to(dtype)).view(logits.shape)
