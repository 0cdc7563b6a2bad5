# SPDX-License-Identifier: Apache-2.0
"""How much each token counts in the loss, by the number of loss tokens of its sample (--loss-weighting)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossWeighting = Literal["token", "sample", "sqrt"]
LOSS_WEIGHTINGS: tuple[LossWeighting, ...] = get_args(LossWeighting)
_POWERS: dict[LossWeighting, float] = {"token": 0.0, "sample": 1.0, "sqrt": 0.5}


def loss_weights(loss_mask: Tensor, lengths: Tensor | None, weighting: LossWeighting) -> Tensor:
    """Returns the weight of each position in the loss sum(w * loss) / sum(w).

    With n the loss tokens of a sample, each of them has the weight 1 (`token`), 1 / n (`sample`) or 1 / sqrt(n)
    (`sqrt`): token, sample and square averaging of InternVL 2.5 (arXiv 2412.05271); Qwen3-VL (arXiv 2511.21631) uses
    `sqrt`. A sample then weighs n, 1 or sqrt(n); without loss tokens it weighs nothing.

    Args:
        loss_mask: [b, s], 1 where the loss counts: complete sequences, before context-parallel sharding.
        lengths: [sequences], the lengths of a pack's sequences, each a sample, whose sum is s (b is 1); None where each
            row is a sample.
        weighting: Which of the three weights.

    Returns:
        [b, s] float32, 0 where the loss does not count.
    """
    mask = loss_mask.double()
    if lengths is None:
        numbers = mask.sum(dim=1, keepdim=True)
    else:
        sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        numbers = torch.zeros(len(lengths), dtype=mask.dtype).index_add(0, sample, mask[0])[sample]
    return (mask * numbers.clamp(min=1) ** -_POWERS[weighting]).float()
