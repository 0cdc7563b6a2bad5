# SPDX-License-Identifier: Apache-2.0
"""Upcycling: the mixture at first computes what the dense model computes, whatever its router chooses."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures import LENGTH, VOCABULARY, build_hf, composite_source

IMAGE = VOCABULARY - 1


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """Returns a vision tower's folder."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    folder = tmp_path_factory.mktemp("tower")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    InternVLVisionModel(InternVLVisionConfig(**sizes, image_size=[32, 32], patch_size=[8, 8])).save_pretrained(folder)
    return folder


def source_of(name: str, tower: Path, folder: Path) -> Any:
    """Returns one of the dense models with a tower and a new connector."""
    return composite_source(build_hf(name), tower, folder)


def build(source: Any, tower: Path) -> Any:
    """Builds the trainer's model with a source's flags and weights."""
    from megatron_smar.config.build import language_config, modality_routing_config, transformer_config, vision_config
    from megatron_smar.conversion.empty_model import as_argv, parse
    from megatron_smar.conversion.importer import read_rows
    from megatron_smar.model.vlm import VisionLanguageModel

    args = parse([*as_argv(source.flags), "--vision-model", str(tower)], VOCABULARY)
    parts = (transformer_config(args), language_config(args), vision_config(args), args.connector)
    model = VisionLanguageModel(*parts, modality_routing_config(args), freeze=frozenset()).eval()
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    assert weights.keys() == {row.megatron for row in source.table}
    for row in source.table:
        target = weights[row.megatron]
        target.copy_(read_rows(row, source.tensors, 0, tuple(target.shape), len(target), target.dtype))
    return model


def logits(model: Any) -> Tensor:
    """Returns the logits of a text, and of a text with an image."""
    from tests.models import prepare

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, IMAGE, (2, LENGTH), generator=generator)
    ids[1, 2:6] = IMAGE
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
    inputs = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), pixels, IMAGE)
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if value is not None})


DENSE = ["llama, version 3", "mistral", "qwen2", "qwen3", "phi3", "phi"]
MIXTURES = [
    ("llama, version 3", {"every": 1}),
    ("llama, version 3", {"every": 2, "num_experts": 3, "topk": 3}),
    ("mistral", {"every": 1, "router_init_std": 5.0}),
    ("qwen2", {"every": 2}),
    ("qwen3", {"every": 1, "num_experts": 5, "topk": 4}),
    ("qwen3", {"every": 2}),
    ("phi3", {"every": 1}),
    ("phi", {"every": 2, "router_init_std": 1.0}),
]


@pytest.mark.parametrize(("name", "settings"), MIXTURES)
def test_the_mixture_at_first_computes_what_the_dense_model_computes(single_rank, tower, tmp_path, name, settings):
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    dense = source_of(name, tower, tmp_path)
    mixture = upcycled(dense, UpcyclingConfig(**settings))
    model = build(mixture, tower)
    routers = [name for name, _ in model.named_parameters() if name.endswith("router.weight")]
    assert len(routers) == len(range(0, dense.config.text_config.num_hidden_layers, settings["every"]))
    found = logits(model)
    torch.testing.assert_close(found, logits(build(dense, tower)), atol=1e-5, rtol=1e-5)
    assert found.std() > 0.1


def test_noise_makes_the_experts_differ_and_the_same_seed_reproduces_it(single_rank, tower, tmp_path):
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    def experts(noise: float, seed: int) -> list[Tensor]:
        model = build(upcycled(dense, UpcyclingConfig(noise=noise, seed=seed)), tower)
        return [value for name, value in model.named_parameters() if re.search(r"experts.*linear_fc2.weight", name)]

    dense = source_of("qwen2", tower, tmp_path)
    plain, noisy, again, other = experts(0.0, 1), experts(0.1, 1), experts(0.1, 1), experts(0.1, 2)
    assert all(torch.equal(plain[0], expert) for expert in plain[1:])
    assert not torch.equal(noisy[0], noisy[1])
    for before, after in zip(plain, noisy, strict=True):
        assert 0.09 < (after - before).std() / before.std() < 0.11
    assert all(map(torch.equal, noisy, again))
    assert not any(map(torch.equal, noisy, other))


def test_routers_differ_between_layers_and_have_the_given_standard_deviation(single_rank, tower, tmp_path):
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    dense = source_of("llama, version 3", tower, tmp_path)
    model = build(upcycled(dense, UpcyclingConfig(every=1, router_init_std=3.0, num_experts=64)), tower)
    one, two = (value for name, value in model.named_parameters() if name.endswith("router.weight"))
    assert not torch.equal(one, two)
    assert 2.7 < one.std() < 3.3


@pytest.mark.parametrize(("name", "every", "kind"), [("llama, version 3", 1, "mixtral"), ("qwen3", 2, "qwen3_moe")])
def test_the_mixture_has_transformers_class_for_it_if_there_is_one(single_rank, tower, tmp_path, name, every, kind):
    """The mixture's table and flags are those of the class, so it is exported like any model."""
    from megatron_smar.conversion import composite
    from megatron_smar.conversion.empty_model import as_argv, parse
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    mixture = upcycled(source_of(name, tower, tmp_path), UpcyclingConfig(every=every))
    assert mixture.config.text_config.model_type == kind
    names = {row.megatron for row in composite.weights(mixture.config, biases=False)}
    assert names == {row.megatron for row in mixture.table}
    upcycled_flags, class_flags = (
        vars(parse([*as_argv(flags), "--vision-model", str(tower)], VOCABULARY))
        for flags in (mixture.flags, composite.flags(mixture.config))
    )
    assert upcycled_flags == class_flags


@pytest.mark.parametrize("name", DENSE)
def test_upcycling_a_dense_checkpoint_equals_upcycling_the_folder_it_was_imported_from(
    single_rank, tower, tmp_path, name
):
    from megatron_smar.conversion.exporter import read_checkpoint
    from megatron_smar.conversion.importer import read_rows, write_model
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    dense = source_of(name, tower, tmp_path / "language")
    write_model(dense, tmp_path / "checkpoint")
    folder, upcycling = tmp_path / "checkpoint", UpcyclingConfig(num_experts=2, noise=0.1)
    mixtures = [upcycled(source, upcycling) for source in (dense, read_checkpoint(folder, folder / "hf"))]
    rows = [{row.megatron: row for row in mixture.table} for mixture in mixtures]
    assert rows[0].keys() == rows[1].keys()
    compared = 0
    for key, row in rows[0].items():
        if "connector" in key:
            continue  # newly initialized in each
        if not row.hf:
            assert not rows[1][key].hf
            continue
        length = sum(run.length for run in row.runs) or dense.tensors[row.hf[0]].shape[0]
        shape = (length, *dense.tensors[row.hf[0]].shape[1:])
        one, two = (
            read_rows(of[key], mixture.tensors, 0, shape, length, torch.float32)
            for of, mixture in zip(rows, mixtures, strict=True)
        )
        assert torch.equal(one, two), key
        compared += 1
    assert compared > 20


def test_a_model_that_has_experts_already_is_refused(single_rank, tower, tmp_path):
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    with pytest.raises(ValueError, match="this mixtral model has experts already; upcycling takes a dense model"):
        upcycled(source_of("mixtral", tower, tmp_path), UpcyclingConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1}, "--num-experts is 1; a mixture has 2 or more"),
        ({"topk": 5}, "--moe-router-topk is 5; give 2 to --num-experts 4"),
        ({"topk": 1}, "--moe-router-topk is 1; give 2"),
        ({"every": 0}, "--every is 0"),
        ({"router_init_std": -1.0}, "--router-init-std -1.0"),
        ({"noise": -1.0}, "--noise -1.0"),
    ],
)
def test_invalid_settings_are_refused_by_their_flag(settings, message):
    from megatron_smar.conversion.upcycle import UpcyclingConfig

    with pytest.raises(ValueError, match=message):
        UpcyclingConfig(**settings)


def test_the_disk_must_have_room_for_all_experts(single_rank, tower, tmp_path, monkeypatch):
    """Each dense weight is read and written once per expert."""
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    mixture = upcycled(source_of("qwen2", tower, tmp_path / "hf"), UpcyclingConfig(num_experts=8, every=1))
    free = 2 * sum(tensor.read().nbytes for tensor in mixture.tensors.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(0, 0, free))
    with pytest.raises(ValueError, match=r"needs .* GB, but its disk has"):
        write_model(mixture, tmp_path / "output")


def test_a_table_without_one_of_the_weights_is_noticed(single_rank, tower, tmp_path):
    from megatron_smar.conversion.empty_model import describe_model
    from megatron_smar.conversion.importer import shards_of

    dense = source_of("qwen2", tower, tmp_path)
    _, tensors, _ = describe_model(dense.config, dense.flags)
    with pytest.raises(RuntimeError, match=dense.table[0].megatron):
        list(shards_of(replace(dense, table=dense.table[1:]), tensors, None))
