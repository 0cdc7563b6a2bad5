# SPDX-License-Identifier: Apache-2.0
"""Samples with the lengths and tiles of LLaVA-1.5's mixture, packed as here and padded as with Hugging Face's trainer.

The mixture is RECONSTRUCTED, see packing.py. Text and tiles are both a sixteenth of their real lengths (16 vision
tokens a tile instead of 256), so that their proportion, on which padding depends, is the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from packing import draw  # benchmarks/packing.py

IMAGE_TOKEN, SCALE, TOKENS_PER_TILE = 5, 16, 16


@dataclass(frozen=True)
class Sample:
    """A sample.

    Attributes:
        ids: Token ids, [n].
        pixels: Tiles, [tiles, 3, H, W].
    """

    ids: Any
    pixels: Any


def draw_samples(number: int, image_size: int, vocabulary: int, longest: int, seed: int = 1) -> list[Sample]:
    """Draws samples, the same for the same arguments.

    Args:
        number: Number of samples.
        image_size: Side of a tile.
        vocabulary: Number of token ids.
        longest: Length to which longer samples are truncated, as in the loaders of both.
        seed: Seed.
    """
    import torch

    real, tiles = draw(number, "tiles", seed)
    text = np.maximum(4, (real - 256 * tiles) // SCALE)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for words, tile_count in zip(text.tolist(), tiles.tolist(), strict=True):
        vision = tile_count * TOKENS_PER_TILE
        ids = torch.randint(6, vocabulary, (min(vision + words, longest),), generator=generator)
        ids[1 : 1 + vision] = IMAGE_TOKEN
        samples.append(Sample(ids, torch.randn(tile_count, 3, image_size, image_size, generator=generator)))
    return samples


def packed(samples: Sequence[Sample], capacity: int) -> list[Any]:
    """Returns the packs of samples as this project's loader makes them without pipeline parallelism: not padded."""
    from megatron_smar.data.batch import EncodedSample, collate
    from megatron_smar.data.packing import pack

    encoded = [
        EncodedSample(
            __key__=str(number),
            __restore_key__=(),
            __subflavors__={},
            input_ids=sample.ids[:-1],
            labels=sample.ids[1:],
            loss_mask=(sample.ids[1:] != IMAGE_TOKEN).float(),
            pixel_values=sample.pixels,
            num_images=len(sample.pixels),
        )
        for number, sample in enumerate(samples)
    ]
    packs = pack([len(one.input_ids) for one in encoded], [len(one.pixel_values) for one in encoded], capacity)
    rows = [[encoded[index] for index in chosen] for chosen in packs]
    return [
        collate([row], num_rows=1, length=sum(len(sample.input_ids) for sample in row), pad_id=0, multiple=1)
        for row in rows
    ]


def padded(samples: Sequence[Sample], size: int, seed: int) -> list[dict[str, Any]]:
    """Returns padded batches, grouped by length with transformers' own function, pictures and text apart as in LLaVA.

    Args:
        samples: The samples.
        size: Samples of a batch.
        seed: Seed of the order.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    batches = []
    for has_pictures in (True, False):
        kind = [sample for sample in samples if bool(len(sample.pixels)) == has_pictures]
        if kind:
            lengths = [len(sample.ids) for sample in kind]
            order = get_length_grouped_indices(lengths, size, generator=generator)
            batches += [_pad([kind[index] for index in order[i : i + size]]) for i in range(0, len(order), size)]
    return batches


def _pad(samples: Sequence[Sample]) -> dict[str, Any]:
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([sample.ids for sample in samples], batch_first=True)
    mask = pad([torch.ones_like(sample.ids) for sample in samples], batch_first=True)
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (mask == 0), -100)
    pixels = torch.cat([sample.pixels for sample in samples])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": pixels if len(pixels) else None,
    }
