# SPDX-License-Identifier: Apache-2.0
"""The task encoder: from raw samples to micro-batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tokenizers import MegatronTokenizer
from megatron.energon import SkipSample

from megatron_smar.data import ConversationTaskEncoder, DataConfig, DataError, SampleError, read_rejects
from megatron_smar.data.rejects import RejectLog
from megatron_smar.data.task_encoder import RawSample
from megatron_smar.data.tokens import TextEncoder

from .conftest import picture, talk

Make = Callable[..., DataConfig]


def raw(record: Any, *images: bytes, key: str = "k") -> RawSample:
    """Returns a sample as stored in a shard."""
    parts = {f"{i}.png": image for i, image in enumerate(images)}
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    return RawSample(__key__=key, __restore_key__=(), parts={"json": content, **parts})


def build(config: DataConfig, tokenizer: MegatronTokenizer, **options: Any) -> ConversationTaskEncoder:
    log = RejectLog("train-rank000", "here", Path(config.rejects_dir) if config.rejects_dir else None, limit=3)
    return ConversationTaskEncoder(config, TextEncoder(tokenizer), log, **options)


TWO_IMAGES = {"conversations": talk("<image> or <image>?", "The first.")}
TEXT = {"text": "The sun rises."}


def test_labels_are_the_next_tokens_and_placeholders_match_the_tiles(make_config: Make, tokenizer: Any) -> None:
    sample = build(make_config(), tokenizer).encode(raw(TWO_IMAGES, picture("red"), picture("blue")))
    assert torch.equal(sample.labels[:-1], sample.input_ids[1:]) and sample.labels[-1] == tokenizer.eos
    context = TextEncoder(tokenizer).image_tokens.context_id
    assert (sample.input_ids == context).sum() == 2 * 4 and sample.pixel_values.shape == (2, 3, 16, 16)
    learned = sample.labels[sample.loss_mask.bool()].tolist()
    assert learned == [*tokenizer.tokenize("The first."), tokenizer.eos]
    assert sample.pixel_values.dtype == torch.uint8
    means = sample.pixel_values.float().mean((2, 3))
    assert means[0, 0] > means[0, 2] and means[1, 0] < means[1, 2]


def test_every_token_of_a_plain_text_but_the_first_is_learned(make_config: Make, tokenizer: Any) -> None:
    sample = build(make_config(), tokenizer).encode(raw(TEXT))
    assert sample.input_ids[0] == tokenizer.bos and sample.loss_mask.all()
    assert sample.labels.tolist() == [*tokenizer.tokenize("The sun rises."), tokenizer.eos]
    assert sample.pixel_values.shape == (0, 3, 16, 16)


def test_images_are_ordered_by_number_not_by_name(make_config: Make, tokenizer: Any) -> None:
    images = [picture((20 * i, 0, 0)) for i in range(11)]
    record = {"conversations": talk("<image>" * 11, "Red.")}
    sample = raw(record, *images)
    sample.parts = dict(sorted(sample.parts.items()))
    reds = build(make_config(), tokenizer).encode(sample).pixel_values[:, 0].float().mean((1, 2))
    assert reds.tolist() == sorted(reds.tolist())


def test_batches_are_padded_to_their_longest_sample(make_config: Make, tokenizer: Any) -> None:
    encoder = build(make_config(pad_to_multiple_of=16), tokenizer)
    samples = [encoder.encode(raw(TEXT)), encoder.encode(raw(TWO_IMAGES, picture(), picture()))]
    batch = encoder.batch(samples)
    longest = len(samples[1].input_ids)
    assert batch.input_ids.shape == batch.labels.shape == (2, 32) and 16 < longest <= 32
    assert batch.pixel_values.shape == (2, 3, 16, 16)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        assert torch.equal(batch.input_ids[row, :n], sample.input_ids)
        assert torch.equal(batch.labels[row, :n], sample.labels)
        assert torch.equal(batch.loss_mask[row, :n], sample.loss_mask)
        assert not batch.padding_mask[row, :n].any() and batch.padding_mask[row, n:].all()
        assert (batch.input_ids[row, n:] == tokenizer.pad).all() and not batch.loss_mask[row, n:].any()


def test_a_fixed_length_holds_for_any_samples(make_config: Make, tokenizer: Any) -> None:
    encoder = build(make_config(pad_to=288), tokenizer)
    assert encoder.batch([encoder.encode(raw(TEXT))]).input_ids.shape == (2, 288)


def test_missing_rows_are_padding_throughout(make_config: Make, tokenizer: Any) -> None:
    encoder = build(make_config(), tokenizer)
    batch = encoder.batch([encoder.encode(raw(TEXT))])
    assert batch.padding_mask[1].all() and not batch.loss_mask[1].any() and batch.__key__ == ["k"]


def test_stages_without_pixels_read_the_same_tokens(make_config: Make, tokenizer: Any) -> None:
    sample = raw(TWO_IMAGES, picture(), picture())
    with_pixels = build(make_config(), tokenizer).encode(sample)
    without = build(make_config(), tokenizer, decode_images=False).encode(sample)
    assert torch.equal(with_pixels.input_ids, without.input_ids) and torch.equal(with_pixels.labels, without.labels)
    assert without.pixel_values.shape == (0, 3, 16, 16)


def test_all_stages_reject_the_same_damaged_images(make_config: Make, tokenizer: Any) -> None:
    damaged = picture(size=(64, 64))[:-30]
    for decode_images in (True, False):
        with pytest.raises(SampleError, match="bad_image"):
            build(make_config(), tokenizer, decode_images=decode_images).encode(raw(TWO_IMAGES, picture(), damaged))


def test_without_verification_a_damaged_image_ends_the_run_on_stages_that_decode(
    make_config: Make, tokenizer: Any
) -> None:
    sample = raw(TWO_IMAGES, picture(), picture(size=(64, 64))[:-30])
    config = make_config(verify_images=False)
    assert len(build(config, tokenizer, decode_images=False).encode(sample).input_ids)
    with pytest.raises(DataError, match="Sample k has a damaged image"):
        build(config, tokenizer).encode(sample)


def test_too_long_samples_are_rejected_and_the_longest_allowed_is_complete(make_config: Make, tokenizer: Any) -> None:
    length = len(build(make_config(), tokenizer).encode(raw(TEXT)).input_ids)
    assert len(build(make_config(seq_length=length), tokenizer).encode(raw(TEXT)).input_ids) == length
    with pytest.raises(SampleError, match=f"too_long: {length} positions, but --seq-length is {length - 1}"):
        build(make_config(seq_length=length - 1), tokenizer).encode(raw(TEXT))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (raw(b"{"), "bad_record: its .json file cannot be read"),
        (raw(b"\xff"), "not_utf8: its .json file is not UTF-8"),
        (RawSample(__key__="k", __restore_key__=(), parts={"0.png": b""}), "bad_record: there is no .json"),
        (RawSample(__key__="k", __restore_key__=(), parts={"json": b"{}", "1.png": b""}), "bad_record: its images are"),
        (raw(TWO_IMAGES, picture()), "image_count_mismatch: 2 <image> tags but 1 image: each"),
        (raw(TWO_IMAGES, picture(), b"none"), "bad_image: image 2 of 2: an image cannot be decoded"),
    ],
)
def test_malformed_samples_are_rejected_by_reason(
    sample: RawSample, message: str, make_config: Make, tokenizer: Any
) -> None:
    with pytest.raises(SampleError, match=message):
        build(make_config(), tokenizer).encode(sample)


def test_rejected_samples_are_reported_once_and_counted(
    make_config: Make, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = build(make_config(rejects_dir=str(tmp_path)), tokenizer)
    for sample in (raw(b"{", key="a"), raw(TWO_IMAGES, key="b")) * 2:
        with pytest.raises(SkipSample):
            encoder.preencode_sample(sample)
        encoder.preencode_sample(raw(TEXT))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped sample a", "skipped sample b"]
    assert lines[1].startswith("skipped sample b: image_count_mismatch: 2 <image> tags but 0 images: ")
    assert read_rejects(tmp_path) == {"bad_record": 1, "image_count_mismatch": 1} == read_rejects(tmp_path, "train")
    assert read_rejects(tmp_path, "valid") == {}


def test_only_rejects_end_the_run_with_their_reasons(make_config: Make, tokenizer: Any) -> None:
    encoder = build(make_config(), tokenizer)
    for _ in range(2):
        with pytest.raises(SkipSample):
            encoder.preencode_sample(raw(b"{"))
    with pytest.raises(DataError, match=r"last 3 samples in a row from here were rejected (?s:.*)bad_record +3 "):
        encoder.preencode_sample(raw(b"{"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "/nowhere"}, "--data-path /nowhere does not exist: make it with .*tools/data/prepare.py"),
        ({"valid_data_path": "/nowhere"}, "--valid-data-path /nowhere does not exist"),
        ({"data_path": "/"}, "--data-path / has no .nv-meta/dataset.yaml"),
        ({"data_path": __file__}, "is neither a folder of shards nor"),
        ({"pad_to": 100}, "--seq-length is 256, and a padded length of 100 would not hold its samples"),
        ({"pad_to_multiple_of": 100}, "256 is not a multiple of 100"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0 must be at least 1"),
        ({"num_workers": -1}, "--num-workers -1 must not be negative"),
        ({"template": "x"}, "--conversation-template x is unknown"),
        ({"max_skip_ratio": 1.5}, r"--max-skip-ratio 1\.5 is not a share: give one from 0 to 1"),
    ],
)
def test_wrong_settings_name_the_flag_and_the_value(changes: dict[str, Any], message: str, make_config: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
