# SPDX-License-Identifier: Apache-2.0
"""Comparing a checkpoint with a Hugging Face model: what counts as agreement, and the inputs of the comparison."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.evaluation.verify import Agreement, compare
from tests.models import build_hf_model, build_model, copy_weights
from tests.unit.conftest import IMAGE_TOKEN

SHAPE = (2, 5, 7)


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@given(st.floats(1e-6, 1e-2), st.integers(0, 2 * 5 * 7 - 1), st.integers(0, 3))
def test_a_single_different_logit_is_found_at_any_position(difference, place, padding):
    reference = random().double()
    trained = torch.cat([reference, torch.full((*SHAPE[:2], padding), 99.0)], dim=-1)
    trained.view(-1, SHAPE[-1] + padding)[place // SHAPE[-1], place % SHAPE[-1]] += difference
    found = compare(reference, trained)
    assert found.difference == pytest.approx(difference)
    assert found.within(difference * 1.01) == (found.agreeing == found.positions == 10)
    assert not found.within(difference * 0.99)


def test_greedy_tokens_must_agree_however_large_the_tolerance():
    reference = random()
    trained = reference.clone()
    best = reference[0, 0].argmax()
    trained[0, 0, best] = reference[0, 0].min() - 1
    found = compare(reference, trained)
    assert (found.agreeing, found.positions) == (9, 10)
    assert not found.within(100.0)
    assert "9 of 10" in found.table(1e-4)


def test_nan_logits_never_agree():
    trained = random()
    trained[1, 2] = torch.nan
    assert not compare(random(), trained).within(1e9)
    assert not compare(trained, trained).within(1e9)


def test_a_difference_equal_to_the_tolerance_is_accepted():
    assert Agreement(1e-4, 1.0, 3, 3).within(1e-4)


@pytest.mark.parametrize(("texts", "pictures", "rows"), [([], 0, 2), (["one two", "three"], 0, 4), (["one"], 2, 3)])
def test_each_text_is_compared_without_an_image_and_with_each_image(hf, tmp_path, texts, pictures, rows):
    from PIL import Image

    from megatron_smar.conversion.composite import load_config
    from megatron_smar.evaluation.verify import build_inputs

    files = []
    for number in range(pictures):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 30), (60 * number, 10, 20)).save(files[-1])
    ids, tiles = build_inputs(hf, load_config(hf), texts, files, multiple_of=4)
    assert ids.shape[0] == rows and ids.shape[1] % 4 == 0
    assert tiles.shape[1:] == (3, 32, 32) and tiles.dtype == torch.uint8
    placeholders = (ids == IMAGE_TOKEN).sum(dim=1)
    per_text = rows // max(1, len(texts))
    assert placeholders.tolist() == [0, *[4] * (per_text - 1)] * max(1, len(texts))
    assert len(tiles) == placeholders.sum() // 4
    assert ids.max() < 128 and ids.min() >= 0


def test_an_equal_model_agrees_and_one_changed_weight_is_noticed(hf: Path, single_rank, monkeypatch):
    from megatron.core.enums import ModelType
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_smar.conversion.composite import load_config
    from megatron_smar.conversion.reference import load_whole, reference_logits
    from megatron_smar.evaluation.verify import build_inputs, checkpoint_logits

    # Another test's backward pass may have left a scale of another shape, to which the pipeline schedule would write.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    model = build_model(str(hf), connector="internvl")
    model.model_type = ModelType.encoder_or_decoder  # as Megatron's get_model sets it
    copy_weights(build_hf_model(IMAGE_TOKEN), model)
    ids, tiles = build_inputs(hf, load_config(hf), [], [], multiple_of=1)
    reference = reference_logits(load_whole(hf, torch.float32), hf, ids, tiles, "cpu")
    found = compare(reference, checkpoint_logits([model], ids, tiles, IMAGE_TOKEN, 4))
    assert found.within(1e-4), found.table(1e-4)
    assert found.largest > 0.1 and found.positions == ids.numel()
    with torch.no_grad():
        model.connector.linear_1.weight[0, 0] += 1.0  # affects images only
    found = compare(reference, checkpoint_logits([model], ids, tiles, IMAGE_TOKEN, 4))
    assert not found.within(1e-4), "images are not compared"
