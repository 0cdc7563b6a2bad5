# SPDX-License-Identifier: Apache-2.0
"""A language model and a tower from their own folders compute what the checkpoint made of them computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import FIRST, VOCABULARY, build_hf
from tests.unit.conversion.test_original_layouts import TOWER, trained, write

SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


def write_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with as many words as the language models have rows, so that image tokens need new rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {
        "<unk>": VOCABULARY - 2,
        "</s>": VOCABULARY - 1,
    }
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_tower(kind: str, folder: Path) -> Path:
    """Writes a vision tower, or a model with a vision tower, with random weights that all affect the output."""
    from transformers import AutoModel, CLIPConfig, CLIPModel, InternVLVisionConfig, SiglipVisionConfig

    from tests.unit.conversion.test_original_layouts import Tower, randomise

    torch.manual_seed(1)
    if kind == "original":
        tower = Tower(TOWER)
        randomise(tower)
        return write(folder, TOWER, tower.state_dict(), tokenizer=False)
    square: dict[str, Any] = {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        text = dict(SIZES, vocab_size=50, max_position_embeddings=8)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZES | square, projection_dim=16))
    elif kind == "siglip":
        model = AutoModel.from_config(SiglipVisionConfig(**SIZES, **square))
    else:
        model = AutoModel.from_config(InternVLVisionConfig(**SIZES, image_size=[32, 32], patch_size=[8, 8]))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def change_one_weight(folder: Path, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if part in name and name.endswith("weight"))
    weights[name] = weights[name].clone()
    weights[name][0] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CASES = [
    ("mixtral", "internvl"),
    ("qwen2", "clip"),
    ("phi", "siglip"),
    ("deepseek_v3", "original"),
    ("phi3", "internvl"),
]


@pytest.mark.parametrize(("kind", "tower"), CASES)
def test_the_parts_have_the_logits_of_their_import_and_changed_parts_do_not(
    tmp_path, single_rank, monkeypatch, kind, tower
):
    from megatron.core.enums import ModelType
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_smar.conversion.composite import Connection
    from megatron_smar.conversion.reference import load_parts, reference_logits
    from megatron_smar.conversion.sources import read_parts
    from megatron_smar.evaluation.verify import build_inputs, checkpoint_logits, compare

    # Another test's backward pass may have left a scale of another shape, to which the pipeline schedule would write.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    language, vision, output = tmp_path / "language", write_tower(tower, tmp_path / "vision"), tmp_path / "out"
    build_hf(FIRST[kind]).save_pretrained(language)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    model = trained(read_parts(language, vision, Connection(), tokenizer, tmp_path / "scratch"), output)
    model.model_type = ModelType.encoder_or_decoder  # as Megatron's get_model sets it

    combined, hf = load_parts(output, language, vision, torch.float32), output / "hf"
    image, text = combined.config.image_token_id, [" ".join(f"w{number}" for number in range(20))]
    ids, tiles = build_inputs(hf, combined.config, text, [], multiple_of=1)
    logits = checkpoint_logits([model], ids, tiles, image, int((ids == image).sum()) // len(tiles))
    found = compare(reference_logits(combined, hf, ids, tiles, "cpu"), logits)
    assert found.within(1e-4), found.table(1e-4)
    assert found.largest > 0.1 and logits.shape[-1] == VOCABULARY + 3, "the new rows must be compared too"
    for folder, part in ((language, "input_layernorm"), (vision, "fc1")):
        change_one_weight(folder, part)
        other = load_parts(output, language, vision, torch.float32)
        assert not compare(reference_logits(other, hf, ids, tiles, "cpu"), logits).within(1e-4), folder.name
