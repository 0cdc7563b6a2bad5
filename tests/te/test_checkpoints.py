# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is the same under Transformer Engine's layers, under the local ones, and in a conversion."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import load_weights, run
from tests.te.building import MODELS, Part, build, layouts_of, objects_of, parse, rank_of, tensors_of, unnumbered
from tests.te.programs import CONVERT, convert, flags_of_checkpoint, read_hf, trainer

KINDS = {"one after another": [], "grouped": ["--moe-grouped-gemm"]}


# Whole on every tensor-parallel rank under Transformer Engine, and a share of it under the local layers.
WHOLE = re.compile(r"\.linear_(q|kv)_down_proj\.weight$")


@pytest.mark.parametrize("name", MODELS)
def test_weights_have_the_same_keys_shapes_and_places_as_in_local_layers(name, tower):
    for layout in layouts_of(name):
        with rank_of(layout):
            expected = tensors_of(build(parse(name, tower, *layout.flags, "--transformer-impl", "local"), layout))
            for kind, flags in KINDS.items():
                tensors = tensors_of(build(parse(name, tower, *layout.flags, *flags), layout))
                assert wholes(tensors) == wholes(expected), (layout, kind)
                assert {place: part for place, part in tensors.items() if not WHOLE.search(place[0])} == {
                    place: part for place, part in expected.items() if not WHOLE.search(place[0])
                }, (layout, kind)


def wholes(tensors: dict[tuple[Any, ...], Part]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each weight as a checkpoint has it."""
    return {key: (part.dtype, part.global_shape) for (key, _), part in tensors.items()}


@pytest.mark.parametrize("name", ["deepseek_v2, Lite", "deepseek_v2, latent queries, groups"])
def test_latents_are_whole_on_every_rank_and_written_by_one(name, tower):
    found = set()
    for layout in layouts_of(name):
        with rank_of(layout):
            for (key, offset), part in tensors_of(build(parse(name, tower, *layout.flags), layout)).items():
                if WHOLE.search(key):
                    assert not any(offset[part.prepended :]) and part.local_shape == part.global_shape[part.prepended :]
                    found.add((layout.flags, key, offset, part.replica, layout.rank))
    writers = Counter((flags, key, offset) for flags, key, offset, replica, _ in found if not any(replica))
    assert writers and set(writers.values()) == {1}
    assert writers.keys() == {(flags, key, offset) for flags, key, offset, _, _ in found}


# Where Transformer Engine keeps FP8's scaling; local layers save the same keys, empty.
LINEAR = """
    self_attention.linear_qkv self_attention.linear_proj self_attention.linear_q_proj self_attention.linear_q_down_proj
    self_attention.linear_q_up_proj self_attention.linear_kv_down_proj self_attention.linear_kv_up_proj mlp.linear_fc1
    mlp.linear_fc2 mlp.experts.experts.linear_fc1 mlp.experts.experts.linear_fc2 mlp.shared_experts.linear_fc1
    mlp.shared_experts.linear_fc2
""".split()


@pytest.mark.parametrize("name", MODELS)
def test_beside_the_weights_are_the_same_extra_states_of_linear_layers(name, alone, tower):
    """Megatron stops at a key that the checkpoint has not: every imported one has those of local layers."""
    local = objects_of(build(parse(name, tower, "--transformer-impl", "local")))
    assert {unnumbered(key) for key in local} <= {
        f"language_model.decoder.layers.{part}._extra_state" for part in LINEAR
    }
    for kind, flags in KINDS.items():
        assert objects_of(build(parse(name, tower, *flags))) == local, kind


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_writes_the_keys_that_the_layers_read(name, alone, tower):
    """What a conversion builds: the same model on the meta device, by the CPU's defaults."""
    from megatron_smar.conversion.empty_model import build_empty

    args = parse(name, tower, "--transformer-impl", "local", "--no-rope-fusion")
    assert tensors_of(build_empty(args)) == tensors_of(build(parse(name, tower)))


@pytest.fixture(scope="module")
def imported(world, tmp_path_factory) -> Path:
    """A checkpoint of Mixtral and a vision tower, made on the CPU beside Transformer Engine."""
    return convert(world, tmp_path_factory.mktemp("imported"))


def test_the_converter_writes_the_same_without_transformer_engine(
    imported, world, python_without_te, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "executable", str(python_without_te))
    other = convert(world, tmp_path)
    found, expected = load_weights(imported / "release"), load_weights(other / "release")
    assert found.keys() == expected.keys() and len(found) > 30
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        drawn = name.startswith("connector.")  # anew for each import
        assert drawn or torch.equal(found[name], tensor), name
    assert (imported / "flags.txt").read_text() == (other / "flags.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_checkpoint_is_loaded_into_its_layers_saved_by_them_and_exported_the_same(imported, kind, tmp_path):
    from megatron.training.checkpointing import save_checkpoint

    place = ["--load", imported, "--finetune", "--save", tmp_path / "saved", "--no-save-optim", "--no-save-rng"]
    with trainer(*flags_of_checkpoint(imported), *KINDS[kind], *place) as (model, optimizer, _):
        save_checkpoint(1, model, optimizer, None, 0)
    export = ["--hf", imported / "hf", "--output"]
    run(CONVERT, "export", "--load", tmp_path / "saved", *export, tmp_path / "of the layers")
    run(CONVERT, "export", "--load", imported, *export, tmp_path / "of the import")
    found, expected = read_hf(tmp_path / "of the layers"), read_hf(tmp_path / "of the import")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
