# SPDX-License-Identifier: Apache-2.0
"""What MoE layers may need to know of each token in addition to its modality, passed along like the modality mask.

Megatron's `padding_mask` argument then carries one floating-point tensor instead of the mask of `routing.modalities`:

    modality mask (M columns) | number of the token's sample | whether its loss counts | scores (M columns, optional)

The MoE layer splits it (`moe_layer.ModalityAwareMoELayer`), because Megatron applies `.bool()` to it after that point.
Sample numbers are exact up to 2^24 in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenColumns(NamedTuple):
    """The parts of a tensor of columns.

    Attributes:
        modality_mask: One-hot modalities, [b, s, M] bool; all False for padding.
        sample_ids: Number of the sample within the micro-batch, [b, s] int64.
        predicts: Whether the position's loss counts, [b, s] bool.
        scores: Soft modality scores, [b, s, M]; None if there are none.
    """

    modality_mask: Tensor
    sample_ids: Tensor
    predicts: Tensor
    scores: Tensor | None


def join_columns(modality_mask: Tensor, sample_ids: Tensor, predicts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the columns [b, s, M + 2] of a mask [b, s, M], sample numbers [b, s] and the positions that predict."""
    return torch.cat([modality_mask.to(dtype), torch.stack([sample_ids, predicts], dim=-1).to(dtype)], dim=-1)


def with_scores(columns: Tensor, scores: Tensor) -> Tensor:
    """Returns columns [b, s, M + 2] together with soft modality scores [s, b, M]: [b, s, 2 M + 2]."""
    return torch.cat([columns, scores.transpose(0, 1)], dim=-1)


def split_columns(columns: Tensor, num_modalities: int) -> TokenColumns:
    """Splits columns, [b, s, M + 2] or [b, s, 2 M + 2]."""
    mask, sample_ids = columns[..., :num_modalities].bool(), columns[..., num_modalities].long()
    scores = columns[..., num_modalities + 2 :]
    return TokenColumns(mask, sample_ids, columns[..., num_modalities + 1].bool(), scores if scores.shape[-1] else None)
