# SPDX-License-Identifier: Apache-2.0
"""Global batches of fixed samples for training steps, with text, images and padding, in rows or packed."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, SIDE, TOKENS_PER_TILE, ROWS, LENGTH, VOCABULARY = 5, 32, 4, 8, 64, 128
# Positions of each row's images, and each row's length without padding.
_PLACES: tuple[tuple[int, ...], ...] = ((), (0, 8, 20, 36, 44), (2, 34), (16,), (8, 52), (), (1,), (8, 40))
_LENGTHS = (64, 64, 56, 48, 64, 64, 56, 64)


def make_batch(packed: bool = False) -> dict[str, Any]:
    """Returns a batch for `tests.distributed.steps`: 8 rows of 64 tokens, or the same samples in two packs of 256."""
    generator = torch.Generator().manual_seed(3)
    shape = (ROWS, LENGTH)
    ids = torch.randint(6, VOCABULARY, shape, generator=generator)
    padding, mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    # Megatron averages the means of replicas and of context-parallel ranks. Therefore every row has the same number of
    # loss tokens, and its first and second quarter too, of which two context-parallel ranks hold one each.
    mask[:, 4:12] = mask[:, 20:28] = 1
    for row, (places, length) in enumerate(zip(_PLACES, _LENGTHS, strict=True)):
        padding[row, length:] = True
        for start in places:
            ids[row, start : start + TOKENS_PER_TILE] = IMAGE
    batch = {
        "ids": ids,
        "labels": torch.randint(6, VOCABULARY, shape, generator=generator),
        "mask": mask,
        "padding": padding,
        "pixels": [torch.randn(len(places), 3, SIDE, SIDE, generator=generator) for places in _PLACES],
        "lengths": None,
        "placeholders": [IMAGE],
        "tokens_per_tile": TOKENS_PER_TILE,
    }
    return _packed(batch) if packed else batch


def _packed(batch: dict[str, Any]) -> dict[str, Any]:
    """Packs four samples without their padding; the padding after the last sample is a separate sequence."""
    packs, size = 2, ROWS // 2
    packed: dict[str, Any] = batch | {
        name: torch.full((packs, size * LENGTH), fill, dtype=batch[name].dtype)
        for name, fill in (("ids", 0), ("labels", 0), ("mask", 0), ("padding", 1))
    }
    lengths = []
    for pack in range(packs):
        rows = range(pack * size, (pack + 1) * size)
        end = sum(_LENGTHS[row] for row in rows)
        for name in ("ids", "labels", "mask", "padding"):
            packed[name][pack, :end] = torch.cat([batch[name][row, : _LENGTHS[row]] for row in rows])
        rest = [size * LENGTH - end] if end < size * LENGTH else []
        lengths.append([*(_LENGTHS[row] for row in rows), *rest])
    pixels = [torch.cat(batch["pixels"][pack * size : (pack + 1) * size]) for pack in range(packs)]
    return packed | {"lengths": lengths, "pixels": pixels}
