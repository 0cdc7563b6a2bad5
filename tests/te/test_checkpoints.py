# SPDX-License-Identifier: Apache-2.0
"""Tests that checkpoints of Transformer Engine's layers, of local layers and of conversions have the same format."""

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


# Replicated on every tensor-parallel rank with Transformer Engine, and sharded with the local layers.
REPLICATED = re.compile(r"\.linear_(q|kv)_down_proj\.weight$")


@pytest.mark.parametrize("name", MODELS)
def test_weights_have_the_same_keys_shapes_and_offsets_as_in_local_layers(name, tower):
    for layout in layouts_of(name):
        with rank_of(layout):
            expected = tensors_of(build(parse(name, tower, *layout.flags, "--transformer-impl", "local"), layout))
            for kind, flags in KINDS.items():
                tensors = tensors_of(build(parse(name, tower, *layout.flags, *flags), layout))
                assert global_shapes(tensors) == global_shapes(expected), (layout, kind)
                assert {place: part for place, part in tensors.items() if not REPLICATED.search(place[0])} == {
                    place: part for place, part in expected.items() if not REPLICATED.search(place[0])
                }, (layout, kind)


def global_shapes(tensors: dict[tuple[Any, ...], Part]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and global shape of each weight in a checkpoint."""
    return {key: (part.dtype, part.global_shape) for (key, _), part in tensors.items()}


@pytest.mark.parametrize("name", ["deepseek_v2, Lite", "deepseek_v2, latent queries, groups"])
def test_latent_projections_are_replicated_on_every_rank_and_written_by_one(name, tower):
    found = set()
    for layout in layouts_of(name):
        with rank_of(layout):
            for (key, offset), part in tensors_of(build(parse(name, tower, *layout.flags), layout)).items():
                if REPLICATED.search(key):
                    assert not any(offset[part.prepended :]) and part.local_shape == part.global_shape[part.prepended :]
                    found.add((layout.flags, key, offset, part.replica, layout.rank))
    writers = Counter((flags, key, offset) for flags, key, offset, replica, _ in found if not any(replica))
    assert writers and set(writers.values()) == {1}
    assert writers.keys() == {(flags, key, offset) for flags, key, offset, _, _ in found}


# Layers in which Transformer Engine stores FP8's scaling; local layers save the same keys, empty.
LINEAR = """
    self_attention.linear_qkv self_attention.linear_proj self_attention.linear_q_proj self_attention.linear_q_down_proj
    self_attention.linear_q_up_proj self_attention.linear_kv_down_proj self_attention.linear_kv_up_proj mlp.linear_fc1
    mlp.linear_fc2 mlp.experts.experts.linear_fc1 mlp.experts.experts.linear_fc2 mlp.shared_experts.linear_fc1
    mlp.shared_experts.linear_fc2
""".split()


@pytest.mark.parametrize("name", MODELS)
def test_the_extra_states_of_linear_layers_are_those_of_local_layers(name, one_rank, tower):
    """Megatron fails on a key that is missing in the checkpoint; imported checkpoints have the keys of local layers."""
    local = objects_of(build(parse(name, tower, "--transformer-impl", "local")))
    assert {unnumbered(key) for key in local} <= {
        f"language_model.decoder.layers.{part}._extra_state" for part in LINEAR
    }
    for kind, flags in KINDS.items():
        assert objects_of(build(parse(name, tower, *flags))) == local, kind


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_writes_the_keys_that_the_layers_read(name, one_rank, tower):
    """A conversion builds the same model on the meta device, with the CPU's defaults."""
    from megatron_smar.conversion.empty_model import build_empty

    args = parse(name, tower, "--transformer-impl", "local", "--no-rope-fusion")
    assert tensors_of(build_empty(args)) == tensors_of(build(parse(name, tower)))


@pytest.fixture(scope="module")
def imported(world, tmp_path_factory) -> Path:
    """A checkpoint of Mixtral and a vision tower, made on the CPU with Transformer Engine installed."""
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
        is_random = name.startswith("connector.")  # newly initialized in each import
        assert is_random or torch.equal(found[name], tensor), name
    assert (imported / "flags.txt").read_text() == (other / "flags.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_checkpoint_is_loaded_and_saved_with_te_layers_and_exported_unchanged(imported, kind, tmp_path):
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
