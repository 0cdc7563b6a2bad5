# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: a complete Hugging Face vision transformer, followed by pixel shuffle."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, image_utils
from transformers.image_processing_base import ImageProcessingMixin

from megatron_smar import huggingface
from megatron_smar.model.vision_balance import TileExchange, even_shares

Channels = tuple[float, float, float]


def _rgb(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue


# Mean and standard deviation per color channel that each kind of vision tower is trained with, by the model type in the
# tower's own config (a composite model has it as vision_config).
NORMALIZATION: dict[str, tuple[Channels, Channels]] = {
    "internvl_vision": (_rgb(image_utils.IMAGENET_DEFAULT_MEAN), _rgb(image_utils.IMAGENET_DEFAULT_STD)),
    "clip_vision_model": (_rgb(image_utils.OPENAI_CLIP_MEAN), _rgb(image_utils.OPENAI_CLIP_STD)),
    "siglip_vision_model": (_rgb(image_utils.IMAGENET_STANDARD_MEAN), _rgb(image_utils.IMAGENET_STANDARD_STD)),
}


@dataclass(frozen=True)
class VisionConfig:
    """Which vision encoder to use, and how its features become tokens.

    Attributes:
        model: Folder of a Hugging Face model, or its name on the hub. Of a composite model (InternVL, CLIP, SigLIP) the
            vision tower is used.
        image_size: Side of a tile, in pixels.
        pixel_shuffle: Factor of the pixel shuffle; 0.5 turns 2 x 2 patches into one token.
        feature_layer: Layer whose hidden state is used; -1 for the last.
        feature_scale: Factor of the features before the shuffle; VITA's checkpoints use 0.5.
        has_weights: Whether to read the encoder's weights from `model`; False if a checkpoint provides them.
    """

    model: str
    image_size: int = 448
    pixel_shuffle: float = 0.5
    feature_layer: int = -1
    feature_scale: float = 1.0
    has_weights: bool = True

    def __post_init__(self) -> None:
        step = 1 / self.pixel_shuffle if self.pixel_shuffle > 0 else 0.0
        if step < 1 or not math.isclose(step, round(step)):
            raise ValueError(
                f"--pixel-shuffle is {self.pixel_shuffle}; it must be 1, 0.5 or another 1/n (InternVL's is 0.5)."
            )

    @property
    def shuffle_step(self) -> int:
        """Number of patches per side that become one token."""
        return round(1 / self.pixel_shuffle)


def load_vision_config(vision: VisionConfig) -> PretrainedConfig:
    """Loads the Hugging Face config of the vision tower and checks it against the tile size and the pixel shuffle.

    Raises:
        ValueError: The model is unknown, is not a supported vision tower, or does not fit the tile size.
    """
    huggingface.register()  # the folder may be an export of this project
    try:
        config = AutoConfig.from_pretrained(vision.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise ValueError(
                f"--vision-model {vision.model!r} names code of its own (auto_map in config.json), which is never run "
                f"here; supported vision towers are {', '.join(NORMALIZATION)}, as transformers' own classes save them."
            ) from error
        raise ValueError(
            f"--vision-model {vision.model!r} is neither a folder with a Hugging Face vision model nor a name on the "
            f"hub that can be reached: {str(error).splitlines()[0]}"
        ) from error
    tower = getattr(config, "vision_config", config)
    if tower.model_type not in NORMALIZATION:
        raise ValueError(
            f"--vision-model {vision.model!r} has the model type {tower.model_type!r}; "
            f"supported vision towers are {', '.join(NORMALIZATION)}."
        )
    expected = side_in_pixels(tower.image_size)
    if vision.image_size != expected:
        raise ValueError(
            f"--image-size is {vision.image_size}, but --vision-model {vision.model!r} takes tiles of {expected} px; "
            f"give --image-size {expected}."
        )
    grid = expected // side_in_pixels(tower.patch_size)
    if grid % vision.shuffle_step:
        raise ValueError(
            f"--pixel-shuffle {vision.pixel_shuffle} needs a patch grid divisible by {vision.shuffle_step}, but "
            f"--vision-model {vision.model!r} has {grid} x {grid} patches."
        )
    return tower


def tokens_per_tile(vision: VisionConfig) -> int:
    """Returns the number of vision tokens per tile (256 for InternViT-300M at 448 px)."""
    tower = load_vision_config(vision)
    return (side_in_pixels(tower.image_size) // side_in_pixels(tower.patch_size) // vision.shuffle_step) ** 2


def normalization(vision: VisionConfig) -> tuple[Channels, Channels]:
    """Returns mean and standard deviation per color channel that the encoder was trained with.

    They are read from the model's preprocessor_config.json; without that file those of its kind of tower are used.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(vision.model)
        return _rgb(settings["image_mean"]), _rgb(settings["image_std"])
    except (OSError, KeyError):
        return NORMALIZATION[load_vision_config(vision).model_type]


def side_in_pixels(size: Any) -> int:
    """Returns the side of an image or patch in pixels: Hugging Face stores it as 448 or [448, 448]."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def pixel_shuffle(features: Tensor, step: int) -> Tensor:
    """Folds step x step neighboring patches into the channels, in InternVL's order.

    Args:
        features: [n, grid, grid, c].
        step: Number of patches per side that become one token.

    Returns:
        [n, (grid / step)^2, c * step^2].
    """
    n, grid, _, channels = features.shape
    side = grid // step
    folded = features.reshape(n, side, step, side, step, channels).permute(0, 1, 3, 2, 4, 5)
    return folded.reshape(n, side * side, step * step * channels)


def normalize(pixels: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Computes (pixels / 255 - mean) / std in float32.

    The constants are plain numbers: Megatron's Float16Module would cast buffers to bf16, and the pixels would be off by
    a fraction of a gray level.

    Args:
        pixels: [n, 3, H, W] uint8.
        mean: Mean of each color channel, of values in 0..1.
        std: Standard deviation of each color channel, of values in 0..1.

    Returns:
        [n, 3, H, W] float32.
    """
    values = pixels.contiguous().float()  # colors apart, as the encoder reads them
    for color in range(3):
        # Computed as pixels / (255 std) - mean / std, in one pass over the memory of many pixels. The shift stays on
        # the host: a kernel takes it as a plain number.
        plane, shift = values[:, color], torch.tensor(-mean[color] / std[color])
        torch.add(shift, plane, alpha=1 / (255 * std[color]), out=plane)
    return values


class VisionEncoder(nn.Module):
    """A Hugging Face vision tower and the pixel shuffle.

    The paper freezes it in both stages; a frozen encoder stays in evaluation mode and keeps no activations.
    """

    def __init__(self, vision: VisionConfig, dtype: torch.dtype, trainable: bool = False) -> None:
        super().__init__()
        self.vision = vision
        self.mean, self.std = normalization(vision)
        tower_config = load_vision_config(vision)
        self.tower = load_tower(vision, tower_config, dtype)
        self.trainable = trainable
        self.tower.requires_grad_(trainable)
        self.num_patches = (side_in_pixels(tower_config.image_size) // side_in_pixels(tower_config.patch_size)) ** 2
        self.tokens_per_tile = self.num_patches // vision.shuffle_step**2
        self.output_size = int(tower_config.hidden_size) * vision.shuffle_step**2
        self.train()

    def train(self, mode: bool = True) -> VisionEncoder:
        """Sets the mode; a frozen encoder stays in evaluation mode, without dropout and stochastic depth."""
        return super().train(mode and self.trainable)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Computes the features of tiles.

        Args:
            pixel_values: [n, 3, image_size, image_size]. uint8 values are pixels and are normalized here as in the
                encoder's training; float values are assumed to be normalized already.

        Returns:
            [n, tokens_per_tile, output_size].
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.mean, self.std)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            output = self.tower(pixel_values.to(self.tower.dtype), output_hidden_states=self.vision.feature_layer != -1)
            hidden = output.last_hidden_state
            if self.vision.feature_layer != -1:
                hidden = output.hidden_states[self.vision.feature_layer]
            patches = hidden[:, -self.num_patches :]  # InternViT and CLIP prepend a class token
            grid = math.isqrt(self.num_patches)
            patches = patches.unflatten(1, (grid, grid)) * self.vision.feature_scale
            return pixel_shuffle(patches, self.vision.shuffle_step)

    def encode(self, pixel_values: Tensor, group: dist.ProcessGroup, exchange: TileExchange | None = None) -> Tensor:
        """Computes the features of tiles like `forward`, dividing the work between ranks.

        Tensor- and context-parallel ranks hold the same tiles. A frozen encoder runs on an equal share of them on each
        rank, and the features are gathered. A trainable encoder runs on all of them on every rank, so that each rank
        has the complete gradient.

        Args:
            pixel_values: See `forward`; the same on all ranks of the group.
            group: The ranks that hold the same tiles.
            exchange: Shares the work with the other replicas, for a frozen encoder; then all replicas call this
                together, also those without tiles.

        Returns:
            [n, tokens_per_tile, output_size].
        """
        if self.trainable or (group.size() == 1 and exchange is None):
            return self(pixel_values)
        # Replicas with one tile give it to different ranks, so that the work of an exchange is even too.
        shares = even_shares(len(pixel_values), group.size(), exchange.replicas.rank() if exchange else 0)
        own = pixel_values.split(shares)[group.rank()]
        features = self._features(own) if exchange is None else exchange.encode(own, self._features)
        if group.size() == 1:
            return features
        padded = features.new_zeros(max(shares), *features.shape[1:])
        padded[: len(features)] = features
        gathered = gather_from_sequence_parallel_region(padded, group=group)
        if min(shares) == max(shares):
            return gathered
        return torch.cat([part[:share] for part, share in zip(gathered.chunk(len(shares)), shares, strict=True)])

    def _features(self, tiles: Tensor) -> Tensor:
        """Returns the features of tiles, of which there may be none."""
        if len(tiles):
            return self(tiles)
        return torch.empty(0, self.tokens_per_tile, self.output_size, dtype=self.tower.dtype, device=tiles.device)


def load_tower(vision: VisionConfig, tower: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a vision tower, with its weights unless a checkpoint will provide them.

    Args:
        vision: The settings of the vision encoder, with the tower's folder.
        tower: The tower's Hugging Face config.
        dtype: The dtype of the weights.

    Raises:
        ValueError: Some or all weights are missing, or they cannot be read.
    """
    if not vision.has_weights:
        return AutoModel.from_config(tower, dtype=dtype)
    composite = AutoConfig.from_pretrained(vision.model, trust_remote_code=False).model_type != tower.model_type
    has_weights = not os.path.isdir(vision.model) or any(Path(vision.model).glob("*.safetensors*"))
    if not has_weights:
        raise ValueError(
            f"--vision-model {vision.model!r} has a config but no weights (*.safetensors); save the model with "
            "save_pretrained(), or give a folder that holds it whole."
        )
    try:
        whole, info = AutoModel.from_pretrained(
            vision.model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"--vision-model {vision.model!r} does not give the tower's weights: {str(error).splitlines()[0]}"
        ) from error
    parts = ("vision_tower.", "vision_model.") if composite else ("",)
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(parts)):
        raise ValueError(  # transformers would initialize them randomly
            f"--vision-model {vision.model!r} lacks {len(missing)} of the tower's weights, such as {missing[0]}; give "
            "a folder that holds it whole."
        )
    if not composite:
        return whole
    return whole.vision_tower if hasattr(whole, "vision_tower") else whole.vision_model
