# SPDX-License-Identifier: Apache-2.0
"""Tests that the vision encoder takes pixels as bytes and normalizes them itself."""

import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from megatron_smar.model.vision import NORMALIZATION, VisionConfig, VisionEncoder, normalize

SIDE = 32
MEAN, STD = NORMALIZATION["internvl_vision"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small InternViT."""
    path: Path = tmp_path_factory.mktemp("vision")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    InternVLVisionModel(InternVLVisionConfig(**sizes, image_size=[SIDE, SIDE], patch_size=[8, 8])).save_pretrained(path)
    return str(path)


def every_value() -> Tensor:
    """Returns [3, 3, 32, 32] uint8 with each of the 256 values in each color channel."""
    return torch.arange(256).repeat(36).view(3, 3, SIDE, SIDE).byte()


def reference(pixels: Tensor) -> Tensor:
    """Normalizes in double precision."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


def test_pixels_are_normalized_in_full_precision() -> None:
    pixels = every_value()
    values = normalize(pixels, MEAN, STD)
    assert values.dtype == torch.float32 and torch.equal(pixels, every_value())
    torch.testing.assert_close(values.double(), reference(pixels), atol=5e-7, rtol=0)


def test_bytes_give_the_features_of_their_normalized_values(folder: str) -> None:
    encoder = VisionEncoder(VisionConfig(folder, SIDE), torch.float32)
    features = encoder(every_value())
    assert torch.equal(features, encoder(normalize(every_value(), MEAN, STD)))
    assert (features - encoder(every_value().float())).abs().max() > 0.1, "the normalization has no effect here"


def test_with_bf16_weights_the_normalization_is_still_in_fp32(single_rank: None, folder: str) -> None:
    """Megatron casts a model's buffers and its floating-point inputs; a rounded mean would shift every pixel."""

    class Seen(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            self.values = values
            raise StopIteration

    encoder = VisionEncoder(VisionConfig(folder, SIDE), torch.bfloat16)
    encoder.tower.embeddings.patch_embeddings = seen = Seen()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    model = Float16Module(TransformerConfig(**sizes, bf16=True, params_dtype=torch.bfloat16), encoder)
    with pytest.raises(StopIteration):
        model(every_value())
    assert torch.equal(seen.values, normalize(every_value(), MEAN, STD).bfloat16())
    mean, std = (torch.tensor(values).bfloat16().view(3, 1, 1) for values in (MEAN, STD))
    wrong = ((every_value().float() / 255 - mean) / std).bfloat16()
    assert (seen.values != wrong).float().mean() > 0.1, "rounded constants would pass too"


def test_a_tower_with_missing_weights_is_refused_and_not_initialized_randomly(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    lost = next(name for name in weights if name.endswith("fc1.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of the tower's weights, such as .*{lost}"):
        VisionEncoder(VisionConfig(str(tmp_path / "hf"), SIDE), torch.float32)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="does not give the tower's weights"):
        VisionEncoder(VisionConfig(str(tmp_path / "hf"), SIDE), torch.float32)
