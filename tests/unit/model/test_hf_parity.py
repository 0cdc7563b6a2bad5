# SPDX-License-Identifier: Apache-2.0
"""Tests that the model computes the same as Hugging Face's InternVL with a Mixtral language model."""

import pytest
import torch
from torch import Tensor

from tests.models import build_hf_model, build_model, copy_weights, prepare

IMAGE, SIDE, TOKENS_PER_TILE = 5, 32, 4


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Returns three samples: two images, one of them at the start; one image, at the end; and text only."""
    generator = torch.Generator().manual_seed(1)
    length = 24
    ids = torch.randint(6, 128, (3, length), generator=generator)
    ids[0, :TOKENS_PER_TILE] = IMAGE  # first positions
    ids[0, 9 : 9 + TOKENS_PER_TILE] = IMAGE
    ids[1, length - TOKENS_PER_TILE :] = IMAGE  # last positions
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=generator)
    return ids, pixels, torch.zeros_like(ids, dtype=torch.bool)


def test_logits_equal_hugging_faces_with_the_same_weights(single_rank, tmp_path):
    hf = build_hf_model(image_token_id=IMAGE)
    hf.model.vision_tower.save_pretrained(tmp_path)
    model = build_model(str(tmp_path), connector="internvl").eval()
    copy_weights(hf, model)
    ids, pixels, padding = samples()
    with torch.no_grad():
        theirs = hf(input_ids=ids, pixel_values=pixels).logits
        ours = model(**prepare(ids, padding, pixels, IMAGE))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.05, "logits near zero would agree whatever the model computes"


def test_swapping_two_images_of_a_sample_changes_only_that_samples_logits(single_rank, tmp_path):
    hf = build_hf_model(image_token_id=IMAGE)
    hf.model.vision_tower.save_pretrained(tmp_path)
    model = build_model(str(tmp_path), connector="internvl").eval()
    ids, pixels, padding = samples()
    with torch.no_grad():
        before = model(**prepare(ids, padding, pixels, IMAGE))
        after = model(**prepare(ids, padding, pixels[[1, 0, 2]], IMAGE))
    assert (before[0] - after[0]).abs().max() > 1e-3
    torch.testing.assert_close(before[1:], after[1:], msg="images of one sample reached another")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_and_siglip_towers_give_one_feature_per_shuffled_patch(kind, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=SIDE, patch_size=8
    )
    tower = (
        CLIPVisionModel(CLIPVisionConfig(**sizes)) if kind == "clip" else SiglipVisionModel(SiglipVisionConfig(**sizes))
    )
    tower.save_pretrained(tmp_path)
    encoder = VisionEncoder(VisionConfig(str(tmp_path), SIDE), torch.float32)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    features = encoder(pixels)
    assert features.shape == (2, TOKENS_PER_TILE, 32 * 4)
    hidden = tower.eval()(pixels).last_hidden_state[:, -16:]
    # Row 0, column 0 of the shuffled grid: patches (0, 0), (0, 1), (1, 0), (1, 1) of a 4 x 4 grid.
    torch.testing.assert_close(features[:, 0], hidden[:, [0, 1, 4, 5]].flatten(1))


@pytest.mark.parametrize("kind", ["internvl", "clip"])
def test_the_vision_tower_of_a_composite_model_is_used(kind, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    if kind == "internvl":
        composite = build_hf_model(image_token_id=IMAGE)
        tower = composite.model.vision_tower
    else:
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        vision = sizes | {"image_size": SIDE, "patch_size": 8}
        composite = CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes))
        tower = composite.vision_model
    composite.save_pretrained(tmp_path)
    encoder = VisionEncoder(VisionConfig(str(tmp_path), SIDE), torch.float32)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    hidden = tower.eval()(pixels).last_hidden_state[:, -16:]
    torch.testing.assert_close(encoder(pixels)[:, 0], hidden[:, [0, 1, 4, 5]].flatten(1))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_vision_model_without_weights_is_refused(tmp_path):
    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    build_hf_model(image_token_id=IMAGE).model.vision_tower.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a config but no weights"):
        VisionEncoder(VisionConfig(str(tmp_path), SIDE), torch.float32)
