# SPDX-License-Identifier: Apache-2.0
"""Imports: each weight where the trainer looks for it, or one sentence and nothing written."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.launch import load_weights
from tests.models import build_hf_model, build_model, copy_weights
from tests.unit.checkpoint.conftest import IMAGE_TOKEN

LANGUAGE, LAYER = "language_model.model.", "language_model.model.layers.1."


def variant(hf: Path, folder: Path, change: Any = None, config: Any = None) -> Path:
    """A copy of a Hugging Face folder, with other weights or another config."""
    shutil.copytree(hf, folder)
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(content)))
    return folder


def convert(hf: Path, output: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Imports a folder; the weights that are then in the checkpoint."""
    from megatron_smar.checkpoint.importer import write_model
    from megatron_smar.checkpoint.sources import read_composite

    write_model(read_composite(hf), output, dtype)
    return {name: value for name, value in load_weights(output / "release").items() if "_extra_state" not in name}


def test_each_weight_is_what_the_trainer_would_save_of_the_same_model(hf, imported, single_rank):
    from megatron_smar.checkpoint.model import sharded_parts

    model = build_model(str(hf), connector="internvl")
    copy_weights(build_hf_model(IMAGE_TOKEN), model)
    stored, compared = load_weights(imported / "release"), set()
    for parts in sharded_parts(model)[0].values():
        for part in parts:
            place = tuple(
                slice(o, o + n)
                for o, n in zip(part.global_offset[part.prepend_axis_num :], part.local_shape, strict=True)
            )
            found = stored[part.key][part.global_offset[: part.prepend_axis_num]][place]
            assert torch.equal(found, part.data), part.key
            compared.add(part.key)
    assert compared == {name for name in stored if "_extra_state" not in name}


def test_flags_and_arguments_describe_the_model_from_which_they_come(hf, imported):
    from megatron_smar.arguments import transformer_config, vision_config
    from megatron_smar.checkpoint.model import parse
    from megatron_smar.checkpoint.torch_dist import CheckpointReader

    argv = (imported / "flags.txt").read_text().split()
    args = parse([*argv, "--vision-model", str(imported / "hf")], 128)
    config = transformer_config(args)
    assert (config.num_layers, config.hidden_size, config.num_moe_experts, config.num_query_groups) == (3, 48, 4, 2)
    assert vision_config(args).image_size == 32
    saved = CheckpointReader(imported).common_state["args"]
    assert saved.padded_vocab_size == 128
    assert saved.vision_model == str(imported / "hf"), "the folder that is gone when the conversion is over"


def test_beside_the_weights_lies_everything_but_weights(hf, imported):
    assert {path.name for path in imported.iterdir()} == {
        "hf",
        "flags.txt",
        "release",
        "latest_checkpointed_iteration.txt",
    }
    assert {path.name for path in (imported / "hf").iterdir()} == {"config.json", "generation_config.json"}


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_weights_are_converted_and_the_modality_biases_stay_in_float32(hf, tmp_path, single_rank, dtype):
    source = variant(hf, tmp_path / "hf", halved)
    found = convert(source, tmp_path / "output", dtype)
    biases = {name for name in found if name.endswith("modality_bias.bias")}
    assert biases and all(found[name].dtype == torch.float32 for name in biases)
    assert {found[name].dtype for name in set(found) - biases} == {dtype or torch.bfloat16}
    theirs = load_file(source / "model.safetensors")[LANGUAGE + "embed_tokens.weight"]
    assert torch.equal(found["language_model.embedding.word_embeddings.weight"], theirs.to(dtype or torch.bfloat16))


def grown(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = weights[LANGUAGE + "embed_tokens.weight"]
    return weights | {LANGUAGE + "embed_tokens.weight": rows[:100].clone()}


def test_new_tokens_start_as_the_mean_of_the_known_ones(hf, tmp_path):
    from megatron_smar.checkpoint.importer import read_rows
    from megatron_smar.checkpoint.safetensors_io import read_folder
    from megatron_smar.checkpoint.weights import Weight

    folder = variant(hf, tmp_path / "hf", lambda weights: {"w": torch.randn(3000, 4).bfloat16()})
    tensors = read_folder(folder)
    found = read_rows(Weight("ours", ("w",), rows=3000), tensors, 0, (3003, 4), 3003, torch.bfloat16)
    known = tensors["w"].read()
    assert torch.equal(found[:3000], known)
    expected = known.double().mean(dim=0).expand(3, 4)
    torch.testing.assert_close(found[3000:].double(), expected, atol=1e-6, rtol=2**-8)  # bfloat16 has 8 bits


def without(*parts: str) -> Any:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


def with_more(**more: Tensor) -> Any:
    return lambda weights: weights | {LANGUAGE + name: tensor for name, tensor in more.items()}


def replaced(name: str, change: Any) -> Any:
    return lambda weights: weights | {name: change(weights[name]).contiguous()}


def tied(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"tie_word_embeddings": True}


def text(**fields: Any) -> Any:
    return lambda content: content | {"text_config": content["text_config"] | fields}


Q, NORM = LAYER + "self_attn.q_proj.weight", LANGUAGE + "norm.weight"
REFUSED = {
    "missing": (
        without("layers.1.self_attn", "lm_head"),
        None,
        r"\(5 missing: language_model.lm_head.weight, .*k_proj",
    ),
    "many missing": (without("layers.1"), None, r"19 missing: .* and 14 more"),
    "unexpected": (with_more(x=torch.zeros(1), y=torch.zeros(1)), None, r"\(2 unexpected: .*model.x, .*model.y\)"),
    "both": (lambda w: without("lm_head")(with_more(x=torch.zeros(1))(w)), None, r"1 missing: .*; 1 unexpected: .*x\)"),
    "another width": (
        replaced(Q, lambda w: w[:, 1:]),
        None,
        rf"{Q} is \[48, 47\], not \[48, 48\]; nothing was written",
    ),
    "too many rows": (replaced(Q, lambda w: torch.cat([w, w])), None, rf"{Q} is \[96, 48\], not \[48, 48\]"),
    "a scalar": (replaced(NORM, lambda w: w[0]), None, rf"{NORM} is \[\], not \[48\]"),
    "no floating-point number": (replaced(NORM, lambda w: w.long()), None, rf"{NORM} is torch.int64"),
    "another vocabulary": (grown, None, r"embed_tokens.weight is \[100, 48\], not \[128, 48\]"),
    "layers that are not there": (None, text(num_hidden_layers=4), "19 missing: .*layers.3"),
    "heads that do not fit": (None, text(num_attention_heads=5), r"q_proj.weight is \[48, 48\], not"),
    "tied, but different": (
        None,
        tied,
        "config.json says tie_word_embeddings, but language_model.lm_head.weight is an",
    ),
    "a setting that is none": (None, text(hidden_size="x"), r"'hidden_size': TypeError: .*expected int, got str"),
    "an unknown part": (None, text(model_type="foo"), r"cannot read it \(.*foo\); supported are internvl with"),
    "an unsupported part": (None, text(model_type="gpt2"), "the language model's type is 'gpt2'; supported are deep"),
    "an unknown model": (None, lambda c: c | {"model_type": "foo"}, "is of the model type 'foo'"),
    "a language model": (None, lambda c: c["text_config"], "is a mixtral model; .* as --language"),
    "another activation": (None, lambda c: c | {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    "features of two layers": (None, lambda c: c | {"vision_feature_layer": [-1, -2]}, r"feature_layer is \[-1, -2\]"),
    "the class token too": (None, lambda c: c | {"vision_feature_select_strategy": "full"}, "strategy is 'full'"),
    "no object": (None, lambda c: [], "config.json is no JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_listed_and_nothing_is_written(hf, tmp_path, single_rank, case):
    change, config, message = REFUSED[case]
    source = variant(hf, tmp_path / "hf", change, config)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, tmp_path / "new" / "output")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_folder_without_config_or_weights_is_named(hf, tmp_path, lost):
    source = variant(hf, tmp_path / "hf")
    (source / lost).unlink()
    with pytest.raises(ValueError, match=rf"{source} (has no config\.json|must hold the model's weights)"):
        convert(source, tmp_path / "output")


def test_a_tied_output_layer_may_be_stored_once_or_twice(hf, tmp_path, single_rank):
    def twice(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {"language_model.lm_head.weight": weights[LANGUAGE + "embed_tokens.weight"].clone()}

    for name, change in (("once", without("lm_head")), ("twice", twice)):
        found = convert(variant(hf, tmp_path / name, change, tied), tmp_path / f"{name}.output")
        assert not any("output_layer" in key for key in found)
    assert "--untie-embeddings-and-output-weights" not in (tmp_path / "once.output" / "flags.txt").read_text()


@pytest.mark.parametrize("is_tied", [True, False])
def test_older_files_leave_it_to_the_language_models_part_whether_weights_are_tied(hf, tmp_path, single_rank, is_tied):
    def older(content: dict[str, Any]) -> dict[str, Any]:
        del content["tie_word_embeddings"]
        return text(tie_word_embeddings=is_tied)(content)

    source = variant(hf, tmp_path / "hf", without("lm_head") if is_tied else None, older)
    found = convert(source, tmp_path / "output")
    assert any("output_layer" in key for key in found) != is_tied
    content = json.loads((tmp_path / "output" / "hf" / "config.json").read_text())
    assert content["tie_word_embeddings"] == is_tied


def test_names_of_newer_files_and_computed_tensors_are_understood(hf, imported, tmp_path, single_rank):
    def newer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {LANGUAGE: "model.language_model.", "language_model.lm_head": "lm_head"}
        names |= {part: f"model.{part}" for part in ("vision_tower.", "multi_modal_projector.")}
        found = {}
        for name, tensor in weights.items():
            prefix = next(prefix for prefix in names if name.startswith(prefix))
            found[names[prefix] + name.removeprefix(prefix)] = tensor
        return found | {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}

    found = convert(variant(hf, tmp_path / "hf", newer), tmp_path / "output")
    expected = load_weights(imported / "release")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_disk_must_have_room_for_what_is_written_and_not_only_for_what_is_read(
    hf, tmp_path, single_rank, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    size = sum(tensor.nbytes for tensor in load_file(hf / "model.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size))
    source = variant(hf, tmp_path / "hf", halved)
    with pytest.raises(ValueError, match=r"but its disk has .* GB free"):
        convert(source, tmp_path / "output", torch.float32)  # and the biases, which the folder does not have
    assert not (tmp_path / "output").exists()
    convert(source, tmp_path / "output")
