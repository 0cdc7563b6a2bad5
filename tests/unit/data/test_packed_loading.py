# SPDX-License-Identifier: Apache-2.0
"""Packs from real shards: every sample is complete, occurs once, and is within the limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_smar.data import DataConfig, EnergonIterator, VisionLanguageBatch, build_train_loader, build_valid_loader
from megatron_smar.data.tokens import TextEncoder

Make = Callable[..., DataConfig]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
LIMITS = {"seq_length": 96, "micro_batch_size": 1, "packing_buffer_size": 12, "packing_max_tiles": 5}


def read(config: DataConfig, tokenizer: Any, samples: int) -> list[VisionLanguageBatch]:
    """Reads micro-batches until they contain that many samples."""
    iterator = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
    batches: list[VisionLanguageBatch] = []
    while sum(len(batch.__key__) for batch in batches) < samples:
        batches.append(next(iterator))
    iterator.close()
    return batches


def one_per_batch(make_config: Make, tokenizer: Any) -> dict[str, VisionLanguageBatch]:
    """Returns each sample in a separate micro-batch."""
    batches = read(make_config(seq_length=96, micro_batch_size=1, shuffle_buffer_size=1), tokenizer, 50)
    return {batch.__key__[0]: batch for batch in batches}


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_pack_has_complete_samples_within_the_limits(make_config: Make, tokenizer: Any, multiple: int) -> None:
    single = one_per_batch(make_config, tokenizer)
    config = make_config(**LIMITS, packing_multiple_of=multiple, pad_to_multiple_of=multiple)
    packs = read(config, tokenizer, 500)
    assert {key for pack in packs for key in pack.__key__} == set(single)
    assert max(len(pack.__key__) for pack in packs) > 2
    for pack in packs:
        assert pack.lengths is not None and pack.input_ids.shape[0] == 1
        assert pack.lengths.sum() == pack.input_ids.shape[1] <= 96 and not (pack.lengths % multiple).any()
        assert len(pack.pixel_values) <= 5
        assert pack.num_text_only == sum(not len(single[key].pixel_values) for key in pack.__key__)
        start, tiles = 0, 0
        for key, length in zip(pack.__key__, pack.lengths.tolist(), strict=False):
            sample = single[key]
            end = start + sample.input_ids.shape[1]
            for name in ("input_ids", "labels", "loss_mask", "padding_mask"):
                assert torch.equal(getattr(pack, name)[:, start:end], getattr(sample, name))
            assert (
                pack.padding_mask[0, end : start + length].all() and not pack.loss_mask[0, end : start + length].any()
            )
            count = len(sample.pixel_values)
            assert torch.equal(pack.pixel_values[tiles : tiles + count], sample.pixel_values)
            start, tiles = start + length, tiles + count
        assert pack.padding_mask[0, start:].all() and tiles == len(pack.pixel_values)


def test_a_sample_with_more_tiles_than_a_pack_holds_is_skipped_and_reported(
    make_config: Make, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**(LIMITS | {"packing_max_tiles": 1, "max_skip_ratio": 1.0}))
    packs = read(config, tokenizer, 50)
    assert max(len(pack.pixel_values) for pack in packs) == 1
    assert "too_many_tiles: 2 image tiles, but --packing-max-tiles is 1" in capfd.readouterr().err


def test_packs_have_little_padding(make_config: Make, tokenizer: Any) -> None:
    packs = read(make_config(**(LIMITS | {"packing_buffer_size": 50, "packing_max_tiles": None})), tokenizer, 500)
    filled = sum(float((~pack.padding_mask).sum()) for pack in packs) / (96 * len(packs))
    single = one_per_batch(make_config, tokenizer).values()
    one_each = sum(float((~batch.padding_mask).sum()) for batch in single) / (96 * len(single))
    assert filled > 0.85 > 2 * one_each


def test_validation_packs_every_sample_once_in_each_pass(make_config: Make, tokenizer: Any) -> None:
    config = make_config(**LIMITS)
    iterator = EnergonIterator(
        build_valid_loader(config, tokenizer, 0, 1, num_batches=100), config, batches_per_pass=100
    )
    first = [next(iterator) for _ in range(6)]
    keys = [key for batch in first for key in batch.__key__]
    assert sorted(keys[:11]) == [f"val_{i:09d}" for i in range(11)]
    iterator.close()


def test_a_packs_padding_has_the_pad_id_and_a_length(make_config: Make, tokenizer: Any) -> None:
    pack = read(make_config(**LIMITS, pad_to=128), tokenizer, 1)[0]
    assert pack.input_ids.shape == (1, 128) and pack.lengths is not None and pack.lengths.sum() == 128
    assert (pack.input_ids[pack.padding_mask] == TextEncoder(tokenizer).pad_id).all()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"micro_batch_size": 2}, "--micro-batch-size 2"),
        ({"packing_buffer_size": 0}, "--packing-buffer-size 0"),
        ({"packing_buffer_size": None}, "--packing-max-tiles"),
        ({"packing_max_tiles": 0}, "--packing-max-tiles 0"),
        ({"seq_length": 90, "packing_multiple_of": 4}, "--seq-length 90"),
    ],
)
def test_invalid_packing_settings_are_refused_with_their_flag(
    make_config: Make, changes: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ValueError, match=flag):
        make_config(**(LIMITS | changes))
