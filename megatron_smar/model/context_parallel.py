# SPDX-License-Identifier: Apache-2.0
"""Which positions of a sequence each context-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zigzag_positions(
    lengths: Sequence[int] | int, context_parallel_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Returns the positions that each context-parallel rank holds, [cp, s / cp], in the order it holds them.

    Megatron splits a sequence into 2 cp chunks and gives rank r the chunks r and 2 cp - 1 - r, which balances the work
    under a causal mask (`megatron.core.utils.get_batch_on_this_cp_rank`). Each sequence of a pack is split separately,
    as Transformer Engine expects.

    Args:
        lengths: Length of the sequence, or of each sequence of a pack; multiples of 2 cp.
        context_parallel_size: Number of context-parallel ranks, cp.
        device: Device of the result.
    """
    parts, first = [], 0
    for length in [lengths] if isinstance(lengths, int) else lengths:
        chunks = torch.arange(first, first + length, device=device).view(2 * context_parallel_size, -1)
        parts.append(torch.cat([chunks[:context_parallel_size], chunks.flip(0)[:context_parallel_size]], dim=1))
        first += length
    return torch.cat(parts, dim=1)
