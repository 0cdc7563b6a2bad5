# SPDX-License-Identifier: Apache-2.0
"""Which modality fills each position.

Two forms of the same thing. Ids, [b, s] int: 0 text, 1 vision, further numbers for further modalities, -1 padding.
Mask, [b, s, M] bool: one-hot, all False for padding. The mask is what travels with the activations: it goes through
Megatron's own `padding_mask` argument, from the model through every block and layer (and through activation
recomputation) to the router, whose one transpose and `.bool()` on the way leave it unharmed, where ids would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEXT = 0
VISION = 1
PADDING = -1


def modality_name(modality: int) -> str:
    """A modality's name in logs, by its id: text, vision, then modality_2 and so on."""
    return {TEXT: "text", VISION: "vision"}.get(modality, f"modality_{modality}")


def modality_ids_from_tokens(input_ids: Tensor, image_token_id: int, padding_mask: Tensor | None = None) -> Tensor:
    """Modality ids of a batch of token ids.

    Args:
        input_ids: [b, s], with one `image_token_id` per position that the vision encoder fills.
        image_token_id: The placeholder's id. The tokens around an image (`<img>`, newlines) are text.
        padding_mask: [b, s] bool, True where there is padding (Megatron's polarity), or None.

    Returns:
        [b, s] int8.
    """
    ids = torch.where(input_ids == image_token_id, VISION, TEXT).to(torch.int8)
    return ids if padding_mask is None else ids.masked_fill(padding_mask, PADDING)


def modality_mask_from_ids(modality_ids: Tensor, num_modalities: int) -> Tensor:
    """[..., M] bool, one-hot, from ids [...]; padding (-1) is False everywhere."""
    modalities = torch.arange(num_modalities, device=modality_ids.device, dtype=modality_ids.dtype)
    return modality_ids.unsqueeze(-1) == modalities
