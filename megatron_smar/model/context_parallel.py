# SPDX-License-Identifier: Apache-2.0
"""Which positions of a sequence each context-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zigzag_positions(
    lengths: Sequence[int] | int, context_parallel_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Positions that each context-parallel rank holds, [cp, s / cp], in its order.

    Megatron cuts a sequence into 2 cp chunks and gives rank r chunks r and 2 cp - 1 - r, so that all have as much to do
    under a causal mask (`megatron.core.utils.get_batch_on_this_cp_rank`); each sequence of a pack is cut by itself, as
    Transformer Engine expects.

    Args:
        lengths: Length of the sequence, or of each sequence of a pack; multiples of 2 cp.
        context_parallel_size: cp.
        device: Where the result lies.
    """
    parts, first = [], 0
    for length in [lengths] if isinstance(lengths, int) else lengths:
        chunks = torch.arange(first, first + length, device=device).view(2 * context_parallel_size, -1)
        parts.append(torch.cat([chunks[:context_parallel_size], chunks.flip(0)[:context_parallel_size]], dim=1))
        first += length
    return torch.cat(parts, dim=1)
