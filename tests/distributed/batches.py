# SPDX-License-Identifier: Apache-2.0
"""The global batches that the parallel layouts train on."""

from typing import Any

import torch

IMAGE, CHART, SIDE, TOKENS_PER_TILE, ROWS, LENGTH, VOCABULARY = 5, 4, 32, 4, 8, 32, 128
PACKS, PACK_LENGTH = 2, 128


def make_batch(name: str, seed: int = 3) -> dict[str, Any]:
    """Makes a global batch of 8 rows of 32 positions; another seed gives other tokens and images at the same positions.

    `mixed`: rows of text only, mostly images, images and padding. Every row has 8 loss tokens, since Megatron averages
    the means of micro-batches and replicas; its two context-parallel shares have 6 and 2, or 0 and 8 of them.
    `uneven`: rows with very different numbers of loss tokens.
    `one share`: loss tokens only in the second of two context-parallel shares, and no padding.
    `other padding`: same as `mixed`, with other ids in the padding.
    `extremes`: pairs of rows with only text, only vision, only padding, and all of these.
    `no images`: only text.
    `three modalities`: same as `mixed`, but every other tile is of a second kind of image.
    `no empty row`: rows with 2 to 16 loss tokens.
    `packed`: the rows of `mixed` without their padding, concatenated four at a time in a row of 128.
    `packed uneven`: the same of the rows of `uneven`.
    """
    if name.startswith("packed"):
        return _packed(make_batch(name.removeprefix("packed").strip() or "mixed", seed))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (ROWS, LENGTH), generator=generator)
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask = torch.zeros(ROWS, LENGTH)
    mask[:, 2:10] = 1  # of two context-parallel shares, the first has 0 to 8 and 24 to 32
    mask[::2] = mask[::2].roll(10, dims=1)
    places: list[list[int]] = [[] for _ in range(ROWS)]
    if name in ("mixed", "uneven", "other padding", "three modalities"):
        for row in (2, 5):
            padding[row, 28:] = True
        for row in (3, 6):
            padding[row, 20:] = True
        places = [[], [0, 4, 8, 12, 16], [2, 10], [3], [24, 28], [], [1], [6, 20]]
        mask[7] = mask[7].roll(20)  # else no image in the second half of a sequence would have an answer after it
    if name == "uneven":
        mask[0, 2:30] = 1
        mask[1], mask[4, 14:] = 0, 0
        mask[7, 20:32] = 1
    if name == "no empty row":
        mask = (torch.arange(LENGTH) >= LENGTH - 2 * (1 + torch.arange(ROWS)[:, None])).float()
    if name == "one share":
        mask[:, :] = 0
        mask[:, 8:24] = 1
    if name == "extremes":
        places[2], places[3] = list(range(0, LENGTH, TOKENS_PER_TILE)), list(range(0, LENGTH, TOKENS_PER_TILE))
        places[6], places[7] = [4, 20], [0]
        padding[4:6] = True
        padding[7, 20:] = True
        mask[2:6] = 0
    if name == "other padding":
        ids[padding] = VOCABULARY - 1
    for row, starts in enumerate(places):
        for start in starts:
            is_chart = name == "three modalities" and start % (2 * TOKENS_PER_TILE)
            ids[row, start : start + TOKENS_PER_TILE] = CHART if is_chart else IMAGE
    return {
        "ids": ids,
        "labels": torch.randint(6, VOCABULARY, (ROWS, LENGTH), generator=generator),
        "mask": mask,
        "padding": padding,
        "pixels": [torch.randn(len(starts), 3, SIDE, SIDE, generator=generator) for starts in places],
        "lengths": None,
        "placeholders": [IMAGE, CHART],
        "tokens_per_tile": TOKENS_PER_TILE,
    }


def _packed(batch: dict[str, Any]) -> dict[str, Any]:
    packs: dict[str, Any] = batch | {
        "ids": torch.zeros(PACKS, PACK_LENGTH, dtype=torch.int64),
        "labels": torch.zeros(PACKS, PACK_LENGTH, dtype=torch.int64),
        "mask": torch.zeros(PACKS, PACK_LENGTH),
        "padding": torch.ones(PACKS, PACK_LENGTH, dtype=torch.bool),
        "pixels": [torch.cat(batch["pixels"][row : row + ROWS // PACKS]) for row in range(0, ROWS, ROWS // PACKS)],
    }
    lengths = (~batch["padding"]).sum(1).view(PACKS, -1)
    for pack, rows in enumerate(torch.arange(ROWS).view(PACKS, -1)):
        end = int(lengths[pack].sum())
        for name in ("ids", "labels", "mask", "padding"):
            packs[name][pack, :end] = torch.cat([batch[name][row][~batch["padding"][row]] for row in rows])
    # Both packs have samples of the same lengths; the padding after the last sample is a separate sequence.
    assert lengths[0].tolist() == [32, 32, 28, 20] and sorted(lengths[1].tolist()) == [20, 28, 32, 32]
    return packs | {"lengths": [[*pack, PACK_LENGTH - sum(pack)] for pack in lengths.tolist()]}
