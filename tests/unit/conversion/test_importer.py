# SPDX-License-Identifier: Apache-2.0
"""An import stores each weight where the trainer loads it from, or is refused with nothing written."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.architectures import FIRST, VOCABULARY, build_hf, composite_source
from tests.launch import load_weights
from tests.models import build_hf_model, build_model, copy_weights, save_tower
from tests.unit.conftest import IMAGE_TOKEN

LANGUAGE, LAYER = "language_model.model.", "language_model.model.layers.1."


def variant(hf: Path, folder: Path, change: Any = None, config: Any = None) -> Path:
    """Copies a Hugging Face folder, with changed weights or a changed config."""
    shutil.copytree(hf, folder)
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(content)))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a vision tower's folder."""
    return Path(save_tower(tmp_path_factory.mktemp("tower")))


def convert(hf: Path, output: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Imports a folder; returns the weights in the checkpoint."""
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.conversion.sources import read_composite

    write_model(read_composite(hf), output, dtype)
    return {name: value for name, value in load_weights(output / "release").items() if "_extra_state" not in name}


def test_each_weight_is_what_the_trainer_would_save_of_the_same_model(hf, imported, single_rank):
    from megatron_smar.conversion.empty_model import sharded_parts

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


def test_the_imports_flags_and_arguments_describe_its_model(hf, imported):
    from megatron_smar.checkpoint.torch_dist import CheckpointReader
    from megatron_smar.config.build import transformer_config, vision_config
    from megatron_smar.conversion.empty_model import parse

    argv = (imported / "flags.txt").read_text().split()
    args = parse([*argv, "--vision-model", str(imported / "hf")], 128)
    config = transformer_config(args)
    assert (config.num_layers, config.hidden_size, config.num_moe_experts, config.num_query_groups) == (3, 48, 4, 2)
    assert vision_config(args).image_size == 32
    saved = CheckpointReader(imported).common_state["args"]
    assert saved.padded_vocab_size == 128
    assert saved.vision_model == str(imported / "hf"), "it names the temporary folder of the conversion"


def test_the_import_holds_config_flags_and_nothing_else_besides_the_weights(hf, imported):
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
    expected = load_file(source / "model.safetensors")[LANGUAGE + "embed_tokens.weight"]
    assert torch.equal(found["language_model.embedding.word_embeddings.weight"], expected.to(dtype or torch.bfloat16))


# The weights that are wider than bfloat16 among weights of bfloat16, and the checkpoint's tensor that contains them.
DECODER = "language_model.decoder.layers."
MIXED = {
    "keys and values": (("k_proj", "v_proj"), f"{DECODER}self_attention.linear_qkv.weight"),
    "values of one layer": (("layers.2.self_attn.v_proj",), f"{DECODER}self_attention.linear_qkv.weight"),
    "up projections": ((".w3.",), f"{DECODER}mlp.experts.experts.linear_fc1.weight"),
    "one expert of one layer": (
        ("layers.1.block_sparse_moe.experts.3",),
        f"{DECODER}mlp.experts.experts.linear_fc2.weight",
    ),
    "norms of one layer": (("layers.2.input_layernorm",), f"{DECODER}self_attention.linear_qkv.layer_norm_weight"),
}


@pytest.mark.parametrize("wide", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", MIXED)
def test_no_part_of_a_fused_weight_is_rounded_to_another_parts_data_type(hf, tmp_path, single_rank, case, wide):
    parts, key = MIXED[case]
    exact = {}

    def mixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in weights.items():
            exact[name] = tensor.to(wide if any(part in name for part in parts) else torch.bfloat16)
        return dict(exact)

    source = variant(hf, tmp_path / "hf", mixed)
    found = convert(source, tmp_path / "output")
    expected = convert(
        variant(hf, tmp_path / "wide", lambda _: {name: tensor.float() for name, tensor in exact.items()}),
        tmp_path / "expected",
    )
    assert found[key].dtype == torch.float32, (
        "float32 is needed for bfloat16 with float16 too: neither represents the other's numbers"
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def with_fewer_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = weights[LANGUAGE + "embed_tokens.weight"]
    return weights | {LANGUAGE + "embed_tokens.weight": rows[:100].clone()}


def test_rows_for_new_tokens_are_the_mean_of_the_other_rows(hf, tmp_path):
    from megatron_smar.checkpoint.safetensors_io import read_folder
    from megatron_smar.conversion.importer import read_rows
    from megatron_smar.conversion.weights import Weight

    folder = variant(hf, tmp_path / "hf", lambda weights: {"w": torch.randn(3000, 4).bfloat16()})
    tensors = read_folder(folder)
    found = read_rows(Weight("megatron", ("w",), rows=3000), tensors, 0, (3003, 4), 3003, torch.bfloat16)
    known = tensors["w"].read()
    assert torch.equal(found[:3000], known)
    expected = known.double().mean(dim=0).expand(3, 4)
    torch.testing.assert_close(
        found[3000:].double(), expected, atol=1e-6, rtol=2**-8
    )  # bfloat16 has 8 significant bits


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
    "integers": (replaced(NORM, lambda w: w.long()), None, rf"{NORM} is torch.int64"),
    "another vocabulary": (with_fewer_rows, None, r"embed_tokens.weight is \[100, 48\], not \[128, 48\]"),
    "missing layers": (None, text(num_hidden_layers=4), "19 missing: .*layers.3"),
    "heads that do not fit": (None, text(num_attention_heads=5), r"q_proj.weight is \[48, 48\], not"),
    "tied, but different": (
        None,
        tied,
        "config.json says tie_word_embeddings, but language_model.lm_head.weight differs from",
    ),
    "an invalid setting": (None, text(hidden_size="x"), r"'hidden_size': TypeError: .*expected int, got str"),
    "an unknown part": (None, text(model_type="foo"), r"cannot read it \(.*foo\); supported are internvl with"),
    "an unsupported part": (None, text(model_type="gpt2"), "the language model's type is 'gpt2'; supported are deep"),
    "an unknown model": (None, lambda c: c | {"model_type": "foo"}, "is of the model type 'foo'"),
    "a language model": (None, lambda c: c["text_config"], "is a mixtral model; .* as --language"),
    "another activation": (None, lambda c: c | {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    "features of two layers": (None, lambda c: c | {"vision_feature_layer": [-1, -2]}, r"feature_layer is \[-1, -2\]"),
    "the class token too": (None, lambda c: c | {"vision_feature_select_strategy": "full"}, "strategy is 'full'"),
    "no object": (None, lambda c: [], "config.json is not a JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(hf, tmp_path, single_rank, case):
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
def test_in_older_files_the_language_models_config_says_whether_weights_are_tied(hf, tmp_path, single_rank, is_tied):
    def older(content: dict[str, Any]) -> dict[str, Any]:
        del content["tie_word_embeddings"]
        return text(tie_word_embeddings=is_tied)(content)

    source = variant(hf, tmp_path / "hf", without("lm_head") if is_tied else None, older)
    found = convert(source, tmp_path / "output")
    assert any("output_layer" in key for key in found) != is_tied
    content = json.loads((tmp_path / "output" / "hf" / "config.json").read_text())
    assert content["tie_word_embeddings"] == is_tied


def test_names_of_newer_files_are_translated_and_computed_tensors_ignored(hf, imported, tmp_path, single_rank):
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


def test_the_disk_must_have_room_for_the_written_data_type_not_the_stored_one(hf, tmp_path, single_rank, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = sum(tensor.nbytes for tensor in load_file(hf / "model.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size))
    source = variant(hf, tmp_path / "hf", halved)
    with pytest.raises(ValueError, match=r"but its disk has .* GB free"):
        convert(source, tmp_path / "output", torch.float32)  # plus the biases, which the folder lacks
    assert not (tmp_path / "output").exists()
    convert(source, tmp_path / "output")


# Weights that transformers keeps in float32 for these two types; models of other types have none.
FLOAT32 = {
    "deepseek_v2": ("mlp.gate.weight",),
    "deepseek_v3": ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
}


@pytest.mark.parametrize("kind", FIRST)
def test_weights_that_transformers_keeps_in_float32_stay_so_in_import_and_export(tower, tmp_path, single_rank, kind):
    from transformers import AutoModelForCausalLM

    from megatron_smar.conversion.exporter import export_model
    from megatron_smar.conversion.importer import write_model

    source = composite_source(build_hf(FIRST[kind]), tower, tmp_path / "language")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "language", dtype=torch.bfloat16).state_dict()
    wide = {name for name, tensor in reference.items() if tensor.dtype == torch.float32}
    for place, dtype in (("unchanged", None), ("half", torch.bfloat16)):
        write_model(source, tmp_path / place, dtype)
    export_model(tmp_path / "unchanged", tmp_path / "half" / "hf", tmp_path / "out", dtype=torch.bfloat16)
    export_model(tmp_path / "half", tmp_path / "half" / "hf", tmp_path / "out of half")
    stored = load_file(tmp_path / "language" / "model.safetensors")
    for folder in ("out", "out of half"):
        found = load_file(tmp_path / folder / "model.safetensors")
        kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
        assert kept == {f"language_model.{name}" for name in wide}
        assert all(name.endswith(FLOAT32.get(kind, ())) for name in kept) and bool(kept) == (kind in FLOAT32)
        for name in kept:
            assert torch.equal(found[name], stored[name.removeprefix("language_model.")]), name


def test_a_new_connector_depends_on_the_seed_only(tower, tmp_path, single_rank):
    from megatron_smar.conversion import composite
    from megatron_smar.conversion.importer import write_model

    source = composite_source(build_hf(FIRST["mixtral"]), tower, tmp_path / "language")
    initialized = []
    for number, seed in enumerate((7, 7, 8)):
        table = composite.weights(source.config, biases=False, connector_seed=seed)
        torch.manual_seed(number)
        write_model(replace(source, table=table), tmp_path / str(number))
        found = load_weights(tmp_path / str(number) / "release")
        initialized.append([found[f"connector.linear_{layer}.weight"] for layer in (1, 2)])
    for one, again, other in zip(*initialized, strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)
        bound = 1 / one.shape[1] ** 0.5  # the bound of torch.nn.Linear's initialization
        assert 0.9 * bound < one.max() <= bound and -bound <= one.min() < -0.9 * bound


COMMON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "parallel_block": False,
    "use_rope_scaling": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "multi_latent_attention": False,
    "untie_embeddings_and_output_weights": True,
    "true_vocab_size": VOCABULARY,
}
# Megatron's checks remove these arguments; none describes a model.
DEPRECATED = "batch_size warmup model_parallel_size checkpoint_activations recompute_activations".split()
DEPRECATED += ["cuda_graph_scope_deprecated"]
# For each of `FIRST`: arguments that show in no weight's shape, as transformers' code for the type computes.
STORED = {
    "mixtral": {"num_experts": 4, "moe_router_topk": 2, "layernorm_epsilon": 1e-5, "rotary_base": 1000000},
    "qwen3_moe": {"qk_layernorm": True, "qk_norm_scope": "head", "moe_router_topk": 2, "moe_layer_freq": [0, 1]},
    "olmoe": {"qk_layernorm": True, "qk_norm_scope": "projection", "moe_router_pre_softmax": True},
    "deepseek_v2": {
        "moe_router_pre_softmax": True,
        "moe_router_topk": 3,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": 1.0,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "rope_type": "yarn",
        "rotary_scaling_factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "latent_norm_epsilon": 1e-6,
        "layernorm_epsilon": 1e-6,
    },
    "deepseek_v3": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk": 4,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": 2.5,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "rope_type": "yarn",
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
    "llama": {"rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 32.0, "layernorm_epsilon": 1e-6},
    "mistral": {"kv_channels": 16, "layernorm_epsilon": 1e-6},
    "qwen2": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": {"qk_layernorm": True, "qk_norm_scope": "head", "kv_channels": 16},
    "phi3": {"rotary_percent": 0.5, "layernorm_epsilon": 1e-5},
    "phi": {
        "parallel_block": True,
        "output_bias": True,
        "gelu_tanh": True,
        "normalization": "LayerNorm",
        "rotary_percent": 0.5,
        "swiglu": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
    },
}


@pytest.mark.parametrize("kind", FIRST)
def test_an_import_stores_every_flag_of_its_model_so_that_later_runs_can_compare_them(
    tower, tmp_path, single_rank, kind
):
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_smar.checkpoint.torch_dist import CheckpointReader
    from megatron_smar.config.flags import add_arguments
    from megatron_smar.conversion.importer import write_model

    write_model(composite_source(build_hf(FIRST[kind]), tower, tmp_path / "language"), tmp_path / "checkpoint")
    saved = vars(CheckpointReader(tmp_path / "checkpoint").common_state["args"])
    expected = COMMON | STORED[kind]
    assert {name: saved[name] for name in expected} == expected
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    missing = {action.dest for action in parser._actions} - saved.keys()
    assert missing <= {"help", *DEPRECATED}, "a flag that is not stored cannot be compared"
