# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: any Hugging Face vision transformer, taken whole, and pixel shuffle behind it."""

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

Channels = tuple[float, float, float]


def _rgb(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue


# Vision towers by the model type of their own config (composite models carry one as vision_config), and what each kind
# is trained with: mean and standard deviation per colour.
NORMALISATION: dict[str, tuple[Channels, Channels]] = {
    "internvl_vision": (_rgb(image_utils.IMAGENET_DEFAULT_MEAN), _rgb(image_utils.IMAGENET_DEFAULT_STD)),
    "clip_vision_model": (_rgb(image_utils.OPENAI_CLIP_MEAN), _rgb(image_utils.OPENAI_CLIP_STD)),
    "siglip_vision_model": (_rgb(image_utils.IMAGENET_STANDARD_MEAN), _rgb(image_utils.IMAGENET_STANDARD_STD)),
}


@dataclass(frozen=True)
class VisionConfig:
    """Which vision encoder, and how its features become tokens.

    Attributes:
        model: Folder of a Hugging Face model, or its name on the hub. A composite model (InternVL, CLIP, SigLIP) gives
            its vision tower.
        image_size: Side of a tile, in pixels.
        pixel_shuffle: Factor of the pixel shuffle; 0.5 makes one token of 2 x 2 patches.
        feature_layer: Whose hidden state to take, -1 the last.
        feature_scale: Multiplies the features before the shuffle; VITA's checkpoints use 0.5.
        has_weights: Whether to read the encoder's weights from `model`; not where a checkpoint will bring them.
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
        """Patches per side that become one token."""
        return round(1 / self.pixel_shuffle)


def load_vision_config(vision: VisionConfig) -> PretrainedConfig:
    """The Hugging Face config of the vision tower, checked against the tiles.

    Raises:
        ValueError: The model is unknown, is no supported vision tower, or does not fit the tile size.
    """
    huggingface.register()  # the folder may be an export of ours
    try:
        config = AutoConfig.from_pretrained(vision.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise ValueError(
                f"--vision-model {vision.model!r} names code of its own (auto_map in config.json), which is never run "
                f"here; supported vision towers are {', '.join(NORMALISATION)}, as transformers' own classes save them."
            ) from error
        raise ValueError(
            f"--vision-model {vision.model!r} is neither a folder with a Hugging Face vision model nor a name on the "
            f"hub that can be reached: {str(error).splitlines()[0]}"
        ) from error
    tower = getattr(config, "vision_config", config)
    if tower.model_type not in NORMALISATION:
        raise ValueError(
            f"--vision-model {vision.model!r} has the model type {tower.model_type!r}; "
            f"supported vision towers are {', '.join(NORMALISATION)}."
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
    """Vision tokens that one tile becomes (256 for InternViT-300M at 448 px)."""
    tower = load_vision_config(vision)
    return (side_in_pixels(tower.image_size) // side_in_pixels(tower.patch_size) // vision.shuffle_step) ** 2


def normalisation(vision: VisionConfig) -> tuple[Channels, Channels]:
    """Mean and standard deviation per colour that the encoder was trained with.

    From the model's own preprocessor_config.json; a folder without one gets what its kind of tower uses.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(vision.model)
        return _rgb(settings["image_mean"]), _rgb(settings["image_std"])
    except (OSError, KeyError):
        return NORMALISATION[load_vision_config(vision).model_type]


def side_in_pixels(size: Any) -> int:
    """A side of a picture or patch: Hugging Face stores 448 or [448, 448]."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def pixel_shuffle(features: Tensor, step: int) -> Tensor:
    """Folds step x step neighbouring patches into the channels, in InternVL's order.

    Args:
        features: [n, grid, grid, c].
        step: Patches per side that become one.

    Returns:
        [n, (grid / step)^2, c * step^2].
    """
    n, grid, _, channels = features.shape
    side = grid // step
    folded = features.reshape(n, side, step, side, step, channels).permute(0, 1, 3, 2, 4, 5)
    return folded.reshape(n, side * side, step * step * channels)


def normalise(pixels: Tensor, mean: Channels, std: Channels) -> Tensor:
    """(pixels / 255 - mean) / std, in fp32.

    The constants are plain numbers: Megatron's Float16Module would cast buffers to bf16, and the pixels would be off by
    a fraction of a grey level.

    Args:
        pixels: [n, 3, H, W] uint8.
        mean: Of each colour, of values 0..1.
        std: Of each colour.

    Returns:
        [n, 3, H, W] float32.
    """
    values = pixels.float()
    for colour in range(3):
        # In one pass, as pixels / (255 std) - mean / std: there are many, and each pass is through memory. The shift
        # stays on the host, from where a kernel takes it as a number.
        plane, shift = values[:, colour], torch.tensor(-mean[colour] / std[colour])
        torch.add(shift, plane, alpha=1 / (255 * std[colour]), out=plane)
    return values


class VisionEncoder(nn.Module):
    """A Hugging Face vision tower and the pixel shuffle.

    Frozen in both stages of the paper: it then stays in evaluation mode and keeps no activations.
    """

    def __init__(self, vision: VisionConfig, dtype: torch.dtype, trainable: bool = False) -> None:
        super().__init__()
        self.vision = vision
        self.mean, self.std = normalisation(vision)
        tower_config = load_vision_config(vision)
        self.tower = load_tower(vision, tower_config, dtype)
        self.trainable = trainable
        self.tower.requires_grad_(trainable)
        self.num_patches = (side_in_pixels(tower_config.image_size) // side_in_pixels(tower_config.patch_size)) ** 2
        self.tokens_per_tile = self.num_patches // vision.shuffle_step**2
        self.output_size = int(tower_config.hidden_size) * vision.shuffle_step**2
        self.train()

    def train(self, mode: bool = True) -> VisionEncoder:
        """A frozen encoder has no dropout and no stochastic depth, whatever the rest of the model does."""
        return super().train(mode and self.trainable)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of tiles.

        Args:
            pixel_values: [n, 3, image_size, image_size]; uint8 is pixels, which are normalised here as the encoder was
                trained; floats are taken as normalised already.

        Returns:
            [n, tokens_per_tile, output_size].
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values, self.mean, self.std)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            output = self.tower(pixel_values.to(self.tower.dtype), output_hidden_states=self.vision.feature_layer != -1)
            hidden = output.last_hidden_state
            if self.vision.feature_layer != -1:
                hidden = output.hidden_states[self.vision.feature_layer]
            patches = hidden[:, -self.num_patches :]  # InternViT and CLIP put a class token in front
            grid = math.isqrt(self.num_patches)
            patches = patches.unflatten(1, (grid, grid)) * self.vision.feature_scale
            return pixel_shuffle(patches, self.vision.shuffle_step)

    def encode(self, pixel_values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """As `forward`, with the work shared between the ranks of a group that all hold the same tiles.

        Tensor- and context-parallel ranks do. A frozen encoder runs over an even share of the tiles on each, and the
        features are gathered; one that learns runs over all of them on every rank, so that its gradient is whole there.

        Args:
            pixel_values: As for `forward`, the same on all ranks.
            group: These ranks.
        """
        if self.trainable or group.size() == 1:
            return self(pixel_values)
        tiles, share = len(pixel_values), -(-len(pixel_values) // group.size())
        own = pixel_values[group.rank() * share :][:share]
        shape = (share, self.tokens_per_tile, self.output_size)
        features = torch.empty(shape, dtype=self.tower.dtype, device=pixel_values.device)
        if len(own):  # the last ranks may have none
            features[: len(own)] = self(own)
        return gather_from_sequence_parallel_region(features, group=group)[:tiles]


def load_tower(vision: VisionConfig, tower: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A vision tower, with its weights unless a checkpoint will bring them.

    Args:
        vision: Where it is.
        tower: Its config.
        dtype: Of its weights.

    Raises:
        ValueError: They are missing, in part or all, or cannot be read.
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
        raise ValueError(  # transformers would draw them at random
            f"--vision-model {vision.model!r} lacks {len(missing)} of the tower's weights, such as {missing[0]}; give "
            "a folder that holds it whole."
        )
    if not composite:
        return whole
    return whole.vision_tower if hasattr(whole, "vision_tower") else whole.vision_model
