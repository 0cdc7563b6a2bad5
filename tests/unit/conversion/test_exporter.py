# SPDX-License-Identifier: Apache-2.0
"""An export equals the imported folder bit for bit, or is refused in one sentence with nothing written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def assert_same_weights(one: Path, other: Path) -> None:
    """Asserts that two folders hold bitwise identical tensors."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_an_export_is_the_imported_model_bit_for_bit(hf, imported, tmp_path):
    from megatron_smar.conversion.exporter import export_model

    export_model(imported, imported / "hf", tmp_path / "output")
    assert_same_weights(tmp_path / "output", hf)
    assert {path.name for path in (tmp_path / "output").iterdir()} == {path.name for path in hf.iterdir()}
    found, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "output", hf))
    assert found["model_type"] == given["model_type"] == "internvl" and "auto_map" not in found


@pytest.fixture
def biased(hf, tmp_path, single_rank):
    """Returns a folder whose gates have modality biases, and the checkpoint that it is imported to."""
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.conversion.sources import read_composite
    from megatron_smar.huggingface import RemoteFields, write_remote_code

    folder = tmp_path / "biased"
    shutil.copytree(hf, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("gate.weight")]:
        weights[name.removesuffix("weight") + "modality_bias"] = torch.randn(2, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(write_remote_code(folder, content, RemoteFields(True))))
    write_model(read_composite(folder), tmp_path / "checkpoint")
    return folder, tmp_path / "checkpoint"


def test_modality_biases_are_exported_with_modeling_code_and_stay_in_float32(biased, tmp_path):
    from megatron_smar.conversion.exporter import export_model

    folder, checkpoint = biased
    export_model(checkpoint, checkpoint / "hf", tmp_path / "same")
    export_model(checkpoint, checkpoint / "hf", tmp_path / "half", dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")
    same, half = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "half"))
    assert same.keys() == half.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(same[name], tensor), name
        assert half[name].dtype == (torch.float32 if name.endswith("modality_bias") else torch.bfloat16), name
    assert (tmp_path / "same" / "modeling_modality_aware.py").is_file()
    assert json.loads((tmp_path / "same" / "config.json").read_text())["modality_router_bias"]


@pytest.mark.parametrize("biases", [False, True])
def test_a_gate_per_modality_is_imported_and_exported_bit_for_bit(hf, tmp_path, single_rank, biases):
    from megatron_smar.checkpoint.torch_dist import CheckpointReader
    from megatron_smar.conversion.exporter import export_model
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.conversion.sources import read_composite
    from megatron_smar.huggingface import RemoteFields, write_remote_code

    folder, checkpoint = tmp_path / "gates", tmp_path / "checkpoint"
    shutil.copytree(hf, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("gate.weight")]:
        weights[name.removesuffix("weight") + "modality_weight_1"] = torch.randn(weights[name].shape)
        if biases:
            weights[name.removesuffix("weight") + "modality_bias"] = torch.randn(2, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    fields = RemoteFields(modality_router_bias=biases, modality_gates=True)
    (folder / "config.json").write_text(json.dumps(write_remote_code(folder, content, fields)))
    write_model(read_composite(folder), checkpoint)
    assert "--modality-routing modality_gates" in (checkpoint / "flags.txt").read_text()
    stored = CheckpointReader(checkpoint).tensors
    assert stored["language_model.decoder.layers.mlp.router.strategy.gates.1.weight"].size == (3, 4, 48)
    for place in (checkpoint / "hf", hf):  # the strategy of the run says that there are gates, not the config of --hf
        export_model(checkpoint, place, tmp_path / "output")
        assert_same_weights(tmp_path / "output", folder)
        written = json.loads((tmp_path / "output" / "config.json").read_text())
        assert written["modality_gates"] and written["modality_router_bias"] == biases
        shutil.rmtree(tmp_path / "output")


def test_a_run_without_modality_biases_is_exported(hf, imported, tmp_path):
    """The checkpoint is what a run with --no-modality-router-bias saves."""
    from megatron_smar.checkpoint.torch_dist import write_checkpoint
    from megatron_smar.conversion.empty_model import describe_model
    from megatron_smar.conversion.exporter import export_model
    from megatron_smar.conversion.importer import shards_of
    from megatron_smar.conversion.sources import read_composite

    source = read_composite(hf)
    args, tensors, objects = describe_model(source.config, source.flags)
    shards = [shard for shard in shards_of(source, tensors, None) if "modality_bias" not in shard.key]
    write_checkpoint(tmp_path / "checkpoint", shards, objects, args, lambda _: None)
    export_model(tmp_path / "checkpoint", hf, tmp_path / "output")
    assert_same_weights(tmp_path / "output", hf)


def test_padding_rows_of_the_vocabulary_are_left_out(hf, imported, tmp_path):
    """Training with tensor parallelism pads the vocabulary."""
    from megatron_smar.checkpoint.torch_dist import write_checkpoint
    from megatron_smar.conversion.empty_model import describe_model
    from megatron_smar.conversion.exporter import export_model
    from megatron_smar.conversion.importer import shards_of
    from megatron_smar.conversion.sources import read_composite

    source = read_composite(hf)
    args, tensors, objects = describe_model(source.config, source.flags)
    shards = []
    for shard in shards_of(source, tensors, None):
        if shard.shape[0] == 128 and shard.key.startswith("language_model"):
            rows = torch.cat([shard.read(), torch.full((64, *shard.shape[1:]), 9.0)])
            size = tuple(rows.shape)
            shard = replace(shard, shape=size, sizes=size, read=lambda rows=rows: rows)
        shards.append(shard)
    write_checkpoint(tmp_path / "checkpoint", shards, objects, args, lambda _: None)
    export_model(tmp_path / "checkpoint", hf, tmp_path / "output")
    assert_same_weights(tmp_path / "output", hf)


ANOTHER = {
    "fewer layers": ({"num_hidden_layers": 2}, "--num-layers was 3, not 2"),
    "another width": ({"hidden_size": 64}, "--hidden-size was 48, not 64"),
    "the same shapes, another function": ({"rms_norm_eps": 1e-3}, "--norm-epsilon was 1e-05, not 0.001"),
    "more experts per token": ({"num_experts_per_tok": 3}, "--moe-router-topk was 2, not 3"),
    "another vocabulary": (
        {"vocab_size": 200},
        r"embedding.word_embeddings.weight is \[128, 48\] there, not \[200, 48\]",
    ),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_a_config_of_another_model_is_refused(imported, tmp_path, case):
    from megatron_smar.conversion.exporter import export_model

    fields, message = ANOTHER[case]
    shutil.copytree(imported / "hf", tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    content["text_config"] |= fields
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refusal:
        export_model(imported, tmp_path / "hf", tmp_path / "output")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "output").exists()


def test_the_config_of_a_language_model_is_refused(imported, tmp_path):
    from megatron_smar.conversion.exporter import export_model

    content = json.loads((imported / "hf" / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"--hf {tmp_path} is a mixtral model"):
        export_model(imported, tmp_path, tmp_path / "output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exports_config_names_the_data_type_of_its_weights(imported, tmp_path, dtype):
    """transformers loads the weights in the data type that config.json names, whatever they have."""
    from transformers import AutoModelForImageTextToText

    from megatron_smar.conversion.exporter import export_model

    export_model(imported, imported / "hf", tmp_path / "output", dtype=dtype)
    assert {
        parameter.dtype for parameter in AutoModelForImageTextToText.from_pretrained(tmp_path / "output").parameters()
    } == {dtype}
