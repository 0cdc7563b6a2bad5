# SPDX-License-Identifier: Apache-2.0
"""Pretrains the demo's vision encoder, a small InternViT, on training scenes, in place of InternViT's pretraining.

From each pixel-shuffled patch feature (the connector's input) linear heads predict the corner where the patch is and
the object in that corner and, from the mean of the features, the background. The heads are discarded; the encoder is
saved in Hugging Face's format. Held-out scenes are never used for training.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Read when torch is imported: on shared cores, threads that spin while they wait are several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scenes import BACKGROUNDS, CORNERS, IMAGE_SIZE, OBJECTS, Scene, Sprites, load_sprites, render, sample_scenes
from sources import DEFAULT_CACHE, OPENMOJI, SourceError, members
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import InternVLVisionConfig, InternVLVisionModel

from megatron_smar.model.vision import NORMALIZATION, normalize, pixel_shuffle

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
SHUFFLE_STEP = 2
CLASSES = {name: number for number, name in enumerate((None, *OBJECTS))}
COLOURS = {name: number for number, name in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class VisionPretrainingConfig:
    """Size of the encoder and settings of its training.

    Attributes:
        steps: Number of optimizer steps.
        batch_size: Newly sampled scenes per step.
        learning_rate: Peak learning rate, to which a cosine rises in `warmup_fraction` of the steps; another cosine
            then decays to 0.
        threads: Number of CPU threads.
        held_out_scenes: Number of scenes for the accuracy at the end.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    steps: int = 250
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.15
    threads: int = 2
    held_out_scenes: int = 500
    seed: int = 1234

    def __post_init__(self) -> None:
        """Refuses invalid values."""
        for name in ("steps", "batch_size", "threads", "held_out_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be 1 or more.")
        if not 0 < self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}: must be between 0 and 1.")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of heads {self.heads}.")


@dataclass(frozen=True)
class VisionReport:
    """Size and time of the training, and accuracies on held-out scenes."""

    parameters: int
    steps: int
    seconds: float
    quadrant_accuracy: float
    object_accuracy: float
    background_accuracy: float


class SceneReader(nn.Module):
    """The encoder and the heads that are discarded after pretraining."""

    def __init__(self, config: VisionPretrainingConfig) -> None:
        super().__init__()
        vision = InternVLVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,  # keeps the final norm, since the mlp2x_gelu connector has no norm
        )
        self.encoder = InternVLVisionModel(vision)
        nn.init.trunc_normal_(
            self.encoder.embeddings.position_embeddings, std=0.02
        )  # zeros would not tell patches apart
        features = config.hidden_size * SHUFFLE_STEP**2
        self.objects = nn.Linear(features, len(CLASSES))
        self.corners = nn.Linear(features, len(CORNERS))
        self.backgrounds = nn.Linear(features, len(COLOURS))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits of each token's object and corner, [n, tokens, ...], and of the background, [n, colours].

        Args:
            pixel_values: Normalized pixels [n, 3, IMAGE_SIZE, IMAGE_SIZE].
        """
        patches = self.encoder(pixel_values).last_hidden_state[:, 1:]  # without the class token
        tokens = pixel_shuffle(patches.unflatten(1, (GRID, GRID)), SHUFFLE_STEP)
        return self.objects(tokens), self.corners(tokens), self.backgrounds(tokens.mean(dim=1))


def token_corners() -> Tensor:
    """Returns the index in `CORNERS` of each vision token's corner, [tokens]."""
    side = GRID // SHUFFLE_STEP
    half = torch.arange(side) // (side // 2)
    return (half[:, None] * 2 + half[None, :]).flatten()


def collate(scenes: list[Scene], sprites: Sprites) -> tuple[Tensor, Tensor, Tensor]:
    """Returns pixel values [n, 3, H, W], the object in each corner [n, 4] and the background [n]."""
    rendered = torch.from_numpy(np.stack([render(scene, sprites) for scene in scenes])).permute(0, 3, 1, 2)
    pixels = normalize(rendered, *NORMALIZATION["internvl_vision"]).contiguous()
    objects = torch.tensor([[CLASSES[name] for name in scene.cells] for scene in scenes])
    return pixels, objects, torch.tensor([COLOURS[scene.background] for scene in scenes])


def take(source: Iterator[Scene], count: int) -> list[Scene]:
    """Returns the next `count` scenes."""
    return [next(source) for _ in range(count)]


def loss_of(model: SceneReader, batch: tuple[Tensor, Tensor, Tensor], corners: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the tokens' corners and objects, plus that of the background."""
    pixel_values, objects, backgrounds = batch
    object_logits, corner_logits, background_logits = model(pixel_values)
    object_loss = cross_entropy(object_logits.flatten(0, 1), objects[:, corners].flatten())
    corner_loss = cross_entropy(corner_logits.flatten(0, 1), corners.repeat(len(objects)))
    return object_loss + corner_loss + cross_entropy(background_logits, backgrounds)


@torch.inference_mode()
def evaluate(model: SceneReader, scenes: list[Scene], sprites: Sprites) -> tuple[float, float, float]:
    """Returns the accuracies on all corners, on corners that have an object, and on backgrounds.

    The mean logits of a corner's tokens decide the prediction for the corner.
    """
    model.eval()
    corners = token_corners()
    right, full, colours = [], [], []
    for start in range(0, len(scenes), 128):
        pixel_values, objects, backgrounds = collate(scenes[start : start + 128], sprites)
        object_logits, _, background_logits = model(pixel_values)
        guesses = torch.stack([object_logits[:, corners == c].mean(dim=1) for c in range(len(CORNERS))], dim=1)
        right.append(guesses.argmax(dim=-1) == objects)
        full.append(objects != CLASSES[None])
        colours.append(background_logits.argmax(dim=-1) == backgrounds)
    hits = torch.cat(right)
    return (
        hits.float().mean().item(),
        hits[torch.cat(full)].float().mean().item(),
        torch.cat(colours).float().mean().item(),
    )


def train(cache: Path, output: Path, config: VisionPretrainingConfig | None = None) -> VisionReport:
    """Trains the encoder and saves it as a folder that `AutoModel.from_pretrained` loads.

    Args:
        cache: Folder where `sources.fetch` stored the sources.
        output: Folder for config and safetensors.
        config: Settings of the training; the defaults if None.

    Returns:
        Size, time, and accuracies on held-out scenes.

    Raises:
        SourceError: The sources have not been fetched.
    """
    config = config or VisionPretrainingConfig()
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    sprites = load_sprites(members(OPENMOJI, cache)[0])
    source = sample_scenes(random.Random(config.seed), held_out=False)
    model, corners = SceneReader(config), token_corners()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, config.steps, pct_start=config.warmup_fraction, cycle_momentum=False
    )
    started = time.monotonic()
    progress = tqdm(range(config.steps), desc="vision encoder", unit="step", mininterval=5)
    for step in progress:
        loss = loss_of(model, collate(take(source, config.batch_size), sprites), corners)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    seconds = time.monotonic() - started
    held_out = take(sample_scenes(random.Random(config.seed + 1), held_out=True), config.held_out_scenes)
    quadrants, objects, backgrounds = evaluate(model, held_out, sprites)
    model.encoder.save_pretrained(output)
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    return VisionReport(parameters, config.steps, seconds, quadrants, objects, backgrounds)


def main() -> None:
    """Runs the command line."""
    defaults = VisionPretrainingConfig()
    parser = argparse.ArgumentParser(description="Train the demo's small vision encoder on training scenes.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="fetched sources (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo/vision"), help="(default: %(default)s)")
    for name in ("steps", "batch_size", "threads", "seed"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(default: %(default)s)")
    arguments = vars(parser.parse_args())
    cache, output = arguments.pop("cache"), arguments.pop("output")
    try:
        report = train(cache, output, VisionPretrainingConfig(**arguments))
    except (SourceError, ValueError) as error:
        sys.exit(str(error))
    print(
        f"{report.parameters:,} parameters, {report.steps} steps in {report.seconds:.0f} s; held-out accuracy: "
        f"corner {report.quadrant_accuracy:.1%}, of those with an object {report.object_accuracy:.1%}, "
        f"background {report.background_accuracy:.1%}; saved in {output}"
    )


if __name__ == "__main__":
    main()
