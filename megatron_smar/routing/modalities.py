# SPDX-License-Identifier: Apache-2.0
"""The modality of each position, as ids and as a mask.

Ids, [b, s] int: rows of the run's table (`megatron_smar.modalities`): 0 text, 1 vision, further numbers for further
kinds of images, -1 padding. Mask, [b, s, M] bool: one-hot, all False for padding. The mask is passed along with the
activations in Megatron's `padding_mask` argument: from the model through every block and layer (and through activation
recomputation) to the router. On the way Megatron transposes it once and applies `.bool()`, which leaves a mask
unchanged but would destroy ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEXT = 0
VISION = 1
PADDING = -1


def modality_ids_from_tokens(
    input_ids: Tensor, placeholders: Sequence[int], padding_mask: Tensor | None = None
) -> Tensor:
    """Returns the modality ids of a batch of token ids.

    Args:
        input_ids: Token ids [b, s], with one placeholder per position that the vision encoder fills.
        placeholders: Placeholder token id of each kind of images: the first is modality 1, and so on. The tokens around
            an image (`<img>`, newlines) are text.
        padding_mask: [b, s] bool, True where there is padding (as in Megatron), or None.

    Returns:
        Modality ids [b, s], int8.
    """
    ids = torch.full_like(input_ids, TEXT, dtype=torch.int8)
    for modality, placeholder in enumerate(placeholders, start=TEXT + 1):
        ids.masked_fill_(input_ids == placeholder, modality)
    return ids if padding_mask is None else ids.masked_fill(padding_mask, PADDING)


def modality_mask_from_ids(modality_ids: Tensor, num_modalities: int) -> Tensor:
    """Returns the one-hot mask [..., M], bool, of modality ids [...]; all False for padding (-1)."""
    modalities = torch.arange(num_modalities, device=modality_ids.device, dtype=modality_ids.dtype)
    return modality_ids.unsqueeze(-1) == modalities
