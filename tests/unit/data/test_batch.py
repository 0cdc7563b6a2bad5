# SPDX-License-Identifier: Apache-2.0
"""The way of a micro-batch from a worker to the training process."""

import io
import multiprocessing.reduction
from dataclasses import fields

import pytest
import torch
from torch.utils.data import DataLoader

from megatron_smar.data.batch import EncodedSample, VisionLanguageBatch, collate


def sample(tiles: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(tiles)
    ids = torch.randint(9, (5 + tiles,), generator=generator)
    pixels = torch.randint(256, (tiles, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return EncodedSample(
        __key__=str(tiles),
        __restore_key__=(tiles,),
        input_ids=ids[:-1],
        labels=ids[1:],
        loss_mask=torch.ones(len(ids) - 1),
        pixel_values=pixels,
        num_images=tiles,
    )


def pack(samples: list[EncodedSample]) -> VisionLanguageBatch:
    return collate([samples], num_rows=1, length=40, pad_id=0, multiple=2)


@pytest.mark.parametrize("tiles", [(2, 0, 3), (0,), (0, 0), (1,)])
def test_a_batch_changes_on_its_way_from_a_worker(tiles):
    samples = [sample(number) for number in tiles]
    expected = pack(samples)
    assert torch.equal(expected.pixel_values, torch.cat([one.pixel_values for one in samples]))
    (found,) = DataLoader(samples, len(samples), num_workers=1, collate_fn=pack)
    for field in fields(VisionLanguageBatch):
        here, there = getattr(expected, field.name), getattr(found, field.name)
        if isinstance(here, torch.Tensor):
            assert here.dtype == there.dtype and torch.equal(here, there), field.name
            there.zero_()  # and it can be written to
        else:
            assert here == there, field.name


def test_a_tensor_other_than_the_tiles_takes_shared_memory_of_its_own():
    batch, buffer = pack([sample(1)]), io.BytesIO()
    multiprocessing.reduction.ForkingPickler(buffer, -1).dump(batch)
    assert buffer.getvalue().count(b"rebuild_storage") == 1
