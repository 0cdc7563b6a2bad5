# SPDX-License-Identifier: Apache-2.0
"""Every architecture's flags and weight table are compared with transformers' own model."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures import CASES, FIRST, build_config, build_hf, sample_ids
from tests.models import save_tower

IMAGE = 5


@pytest.fixture(scope="session")
def tower(tmp_path_factory) -> str:
    """Saves a vision tower, which every model of the trainer needs."""
    return save_tower(tmp_path_factory.mktemp("tower"))


def on_disk(hf: Any, folder: Path) -> dict[str, Tensor]:
    """Returns a model's weights under the names that `save_pretrained` gives them."""
    from safetensors.torch import load_file

    hf.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def build_megatron(config: Any, tower: str, *more: str, **changes: Any) -> Any:
    """Builds the trainer's model for a language model's config, with added or changed flags."""
    from megatron_smar.config.build import language_config, modality_routing_config, transformer_config, vision_config
    from megatron_smar.conversion.architectures import language_of
    from megatron_smar.conversion.empty_model import as_argv, parse
    from megatron_smar.model.vlm import VisionLanguageModel

    flags = language_of(config).flags(config)
    assert set(changes) <= set(flags)
    argv = [*as_argv(flags | changes), "--vision-model", tower, "--image-size", "32"]
    args = parse([*argv, *more], config.vocab_size)
    model = VisionLanguageModel(
        transformer_config(args),
        language_config(args),
        vision_config(args),
        "mlp2x_gelu",
        modality_routing_config(args),
        freeze=frozenset(),
    )
    return model.eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    """Returns the language model's weights in the trainer, without modality biases, which Hugging Face's lacks."""
    return {
        name: value
        for name, value in model.language_model.state_dict().items()
        if isinstance(value, Tensor) and not name.endswith("modality_bias.bias")
    }


def imported(table: list[Any], hf_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the trainer's weights that a table makes of Hugging Face's."""
    from megatron_smar.conversion.weights import pieces_of

    made = {}
    for row in table:
        length = sum(run.length for run in row.runs) or len(hf_weights[row.hf[0]])
        pieces = pieces_of(row, 0, length)
        parts = [hf_weights[p.name][p.start : p.start + p.length] for p in pieces if p.start is not None]
        made[row.megatron] = torch.cat(parts) if row.runs else hf_weights[row.hf[0]]
    return made


def exported(table: list[Any], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns Hugging Face's weights that a table makes of the trainer's."""
    from megatron_smar.conversion.weights import inverted

    made = {}
    for name, pieces in inverted(table).items():
        ordered = sorted(pieces, key=lambda piece: piece.target)
        parts = [trained[p.name] if p.start is None else trained[p.name][p.start : p.start + p.length] for p in ordered]
        made[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return made


def fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Copies weights into the trainer's model; all of its weights must be given."""
    targets = weights_of(model)
    assert set(weights) == set(targets)
    for name, target in targets.items():
        assert target.shape == weights[name].shape, name
        target.copy_(weights[name])


def logits(model: Any, ids: Tensor) -> Tensor:
    """Returns the trainer's logits of a text."""
    from tests.models import prepare

    inputs = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(0, 3, 32, 32), IMAGE)
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if value is not None})


def convert(name: str, tower: str, folder: Path) -> tuple[Any, Any, list[Any], dict[str, Tensor], Tensor]:
    """Imports one of `CASES`: Hugging Face's model, the trainer's, the table, the weights on disk, and token ids."""
    from megatron_smar.conversion.architectures import language_of

    hf = build_hf(name)
    hf_weights = on_disk(hf, folder)
    table = language_of(hf.config).weights(hf.config)
    model = build_megatron(hf.config, tower)
    fill(model, imported(table, hf_weights))
    return hf, model, table, hf_weights, sample_ids().masked_fill(sample_ids() == IMAGE, 0)


@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_has_transformers_logits_and_converts_back_exactly(name, single_rank, tower, tmp_path):
    hf, model, table, hf_weights, ids = convert(name, tower, tmp_path)
    with torch.no_grad():
        expected = hf(input_ids=ids).logits
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3, "logits near zero would agree whatever the model computes"
    back = exported(table, weights_of(model))
    assert set(back) == set(hf_weights)
    for key, tensor in hf_weights.items():
        assert torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype, key


@pytest.mark.parametrize("name", FIRST.values())
def test_a_wrong_weight_or_order_of_fused_rows_changes_the_logits(name, single_rank, tower, tmp_path):
    _, model, table, hf_weights, ids = convert(name, tower, tmp_path)
    right, before = logits(model, ids), imported(table, hf_weights)
    for row in table:
        target, made = weights_of(model)[row.megatron], before[row.megatron]
        wrong = {"reversed": made.flip(0)}
        if row.runs:
            swapped = dataclasses.replace(row, runs=(row.runs[1], row.runs[0], *row.runs[2:]))
            wrong["swapped"] = imported([swapped], hf_weights)[row.megatron]
        for kind, values in wrong.items():
            target.copy_(values)
            assert (logits(model, ids) - right).abs().max() > 1e-3, f"{row.megatron} {kind} changes nothing"
        target.copy_(made)
    torch.testing.assert_close(logits(model, ids), right)


# Flags whose values depend on the config, and another value that fits the same weights.
DECISIVE = [
    ("mixtral", "moe-router-pre-softmax", True),
    ("qwen3_moe, every second layer dense, tied", "moe-router-pre-softmax", None),
    ("olmoe", "moe-router-pre-softmax", None),
    ("deepseek_v2, Lite", "rotary-scaling-factor", 1.0),
    ("deepseek_v2, Lite", "mscale", 1.0),
    ("deepseek_v2, Lite", "mscale-all-dim", 0.0),
    ("deepseek_v2, latent queries, groups", "moe-router-topk-scaling-factor", None),
    ("deepseek_v2, latent queries, groups", "moe-router-group-topk", None),
    ("deepseek_v3", "moe-router-group-topk", None),
    ("deepseek_v3", "mscale-all-dim", 1.0),
    ("deepseek_v3, Moonlight", "latent-norm-epsilon", None),
    ("deepseek_v3, Moonlight", "rotary-base", 1000),
    ("llama, version 3", "use-rope-scaling", None),
    ("llama, version 3", "rope-scaling-factor", 1.5),
    ("llama, scaled linearly, tied", "rotary-seq-len-interpolation-factor", None),
    ("phi3", "rotary-percent", None),
    ("phi", "rotary-percent", None),
    ("phi", "gelu-tanh", None),
]


@pytest.mark.parametrize(("name", "flag", "value"), DECISIVE)
def test_each_flag_that_depends_on_the_config_changes_the_logits(name, flag, value, single_rank, tower, tmp_path):
    _, model, _, _, ids = convert(name, tower, tmp_path)
    other = build_megatron(build_config(name), tower, **{flag: value})
    fill(other, weights_of(model))
    assert (logits(other, ids) - logits(model, ids)).abs().max() > 2e-4, "less than twice the tolerance of a conversion"


UNSUPPORTED = [
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type in rope_p"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor in rope"),
    ("llama", {"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta in rope_parameters is 10000.5"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("phi", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}, "group_limited_greedy"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("deepseek_v3", {"topk_group": 4}, "num_experts_per_tok // topk_group is 2"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), UNSUPPORTED)
def test_a_setting_that_cannot_be_converted_exactly_is_refused_by_the_name_of_its_field(kind, changes, message):
    from megatron_smar.conversion.architectures import UnsupportedError, language_of

    with pytest.raises(UnsupportedError, match=message) as refusal:
        config = build_config(FIRST[kind], **changes)
        language_of(config).flags(config)
    assert "\n" not in str(refusal.value)


def test_yarn_and_llama_3_settings_that_have_no_flag_are_refused():
    from megatron_smar.conversion.architectures import UnsupportedError, language_of

    for kind, field, value in (
        ("deepseek_v3", "beta_fast", 16),
        ("deepseek_v3", "truncate", False),
        ("deepseek_v3", "original_max_position_embeddings", 8192),
        ("deepseek_v3", "attention_factor", 0.5),
        ("deepseek_v3", "mscale_all_dim", 1.0),
        ("llama", "low_freq_factor", 2.0),
        ("llama", "original_max_position_embeddings", 4096),
    ):
        rope = CASES[FIRST[kind]][1]["rope_parameters"] | {field: value}
        config = build_config(FIRST[kind], rope_parameters=rope)
        with pytest.raises(UnsupportedError, match=field):
            language_of(config).flags(config)


def test_an_unknown_architecture_is_refused_with_the_list_of_supported_ones():
    from transformers import AutoConfig

    from megatron_smar.conversion.architectures import UnsupportedError, language_of

    with pytest.raises(UnsupportedError, match=r"type is 'gpt2'; supported are deepseek_v2, .*, qwen3_moe"):
        language_of(AutoConfig.for_model("gpt2"))


def parse_changed(kind: str, tower: str, *more: str) -> Any:
    """Returns the trainer's arguments for the first case of a model type, with added flags."""
    from megatron_smar.conversion.architectures import language_of
    from megatron_smar.conversion.empty_model import as_argv, parse

    config = build_config(FIRST[kind])
    argv = [*as_argv(language_of(config).flags(config)), "--vision-model", tower, "--image-size", "32"]
    return parse([*argv, *more], config.vocab_size)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("llama", ["--gelu-tanh"], "--gelu-tanh"),
        ("deepseek_v3", ["--parallel-block"], "--parallel-block has no multi-latent attention"),
        ("llama", ["--qk-norm-scope", "projection"], "needs --qk-layernorm"),
        ("llama", ["--latent-norm-epsilon", "1e-6"], "--latent-norm-epsilon"),
    ],
)
def test_incompatible_flags_of_layers_are_refused(kind, more, message, single_rank, tower):
    with pytest.raises(ValueError, match=message) as refusal:
        parse_changed(kind, tower, *more)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("olmoe", {"tensor_model_parallel_size": 8}, "divide the 4 heads of keys, and it is 8"),
        ("deepseek_v3", {"tensor_model_parallel_size": 2}, "--multi-latent-attention needs --sequence-parallel"),
    ],
)
def test_parallel_layouts_with_wrong_norms_or_gradients_are_refused(kind, layout, message, single_rank, tower):
    from megatron_smar.config.checks import check_shape

    args = parse_changed(kind, tower)
    vars(args).update(layout)
    with pytest.raises(ValueError, match=message):
        check_shape(args)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "phi"])
def test_norms_have_the_checkpoint_keys_of_transformer_engines_layers(kind, single_rank, tower):
    from megatron_smar.conversion.empty_model import sharded_parts

    tensors, _ = sharded_parts(build_megatron(build_config(FIRST[kind]), tower))
    layers = "language_model.decoder.layers."
    keys = {part.key.removeprefix(layers) for parts in tensors.values() for part in parts if layers in part.key}
    inside = ("q_layernorm", "k_layernorm", "kv_layernorm")  # separate keys in either case
    norms = {key for key in keys if "norm" in key and not any(name in key for name in inside)}
    fused, moe = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    attention = "self_attention.linear_qkv.layer_norm_weight"
    assert (
        norms
        == {  # in the first two models, layer 0 is dense and layer 1 is an MoE layer
            "qwen3_moe": {f"0.{attention}", f"1.{attention}", f"0.{fused}", f"1.{moe}"},
            "deepseek_v3": {"0.input_layernorm.weight", "1.input_layernorm.weight", f"0.{fused}", f"1.{moe}"},
            "phi": {"shared_layernorm.weight", "shared_layernorm.bias"},
        }[kind]
    )


def test_a_parallel_block_with_biases_can_have_experts(single_rank, tower):
    """Phi after upcycling: experts that are all equal give the dense model's logits."""
    config = build_config(FIRST["phi"])
    dense = build_megatron(config, tower)
    experts = ["--num-experts", "3", "--moe-router-topk", "2", "--moe-router-load-balancing-type", "none"]
    model = build_megatron(config, tower, *experts, "--moe-layer-freq", "[0,1]")
    weights = weights_of(dense)
    for weight in weights.values():
        weight.normal_(0, 0.3)
    for name, target in weights_of(model).items():
        if "router" not in name:
            target.copy_(weights[re.sub(r"experts\.local_experts\.\d+\.", "", name)])
    ids = sample_ids()
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-4, rtol=0)


def test_sequences_longer_than_an_attention_window_are_refused(single_rank, tower):
    window = build_config(FIRST["mistral"]).sliding_window
    assert parse_changed("mistral", tower, "--seq-length", str(window)).seq_length == window
    with pytest.raises(ValueError, match=rf"max_position_embeddings \({window}\)"):
        parse_changed("mistral", tower, "--seq-length", str(window + 1))
