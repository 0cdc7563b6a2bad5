# SPDX-License-Identifier: Apache-2.0
"""InternVL's tiles without a thumbnail after them, for which transformers' image processor has no setting."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GotOcr2ImageProcessor


class ImageProcessorWithoutThumbnail(GotOcr2ImageProcessor):
    """transformers' image processor, which here never adds the full image as a last tile."""

    def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Crops an image to tiles like the base class, without a thumbnail."""
        return super().crop_image_to_patches(*args, **kwargs | {"use_thumbnail": False})

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Returns the number of tiles of an image of this size."""
        number: int = super().get_number_of_image_patches(height, width, images_kwargs)
        return number - 1 if number > 1 else number
