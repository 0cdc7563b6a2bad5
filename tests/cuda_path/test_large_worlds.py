# SPDX-License-Identifier: Apache-2.0
"""Tests that a rank of 8 or 64 of each full-size recipe has the numbers of parameters that the published sizes give."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.memory import Place, buffers, held_parameters, owned
from megatron_smar.planning.shape import ModelShape
from tests.cuda_path.recipes import STAGES, command_on_gpus
from tests.launch import ROOT, users_environment

sys.path.insert(0, str(ROOT / "examples"))


def write_start(recipe: str, output: Path) -> None:
    """Writes convert.sh's output for the published model, as far as a stage reads it at its start: flags and config."""
    from megatron_smar.commands.plan import recipe_config
    from megatron_smar.conversion.composite import flags
    from megatron_smar.conversion.empty_model import as_argv

    config, mixture = recipe_config(ROOT / "examples" / recipe)
    for folder in ("start", STAGES[recipe][0]):
        (output / folder).mkdir(parents=True)
        (output / folder / "latest_checkpointed_iteration.txt").write_text("release")
    (output / "start" / "flags.txt").write_text(" ".join([*as_argv(flags(config)), *mixture]))
    config.save_pretrained(output / "start" / "hf")


def held_by(recipe: str, gpus: int, rank: int, output: Path, layout: Sequence[str] = (), world: int = 0) -> dict:
    """Returns the sizes of one rank in the recipe's last stage, with its layout or another one."""
    write_start(recipe, output)
    from architectures import ARCHITECTURES

    program, given = command_on_gpus(recipe, STAGES[recipe][-1], gpus, output, DATA=str(output))
    assert program.endswith("pretrain_vlm.py")
    vocabulary = ["--tokenizer-type", "NullTokenizer", "--vocab-size", ARCHITECTURES[recipe].language.vocab_size - 1]
    result, world = output / "held.json", world or gpus
    command = [sys.executable, ROOT / "tests/cuda_path/large_world.py", result, *given, *vocabulary, *layout]
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % 8, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    environment = users_environment() | {name: str(value) for name, value in place.items()} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(result.read_text())


def ranks_of(sizes: Sequence[int], often: tuple[str, int, int]) -> list[Any]:
    """Returns recipe, GPUs and rank as parameters: the first, middle and last ranks; `make test` has only `often`."""
    return [
        pytest.param(
            recipe,
            gpus,
            rank,
            id=f"{recipe}, rank {rank} of {gpus}",
            marks=() if (recipe, gpus, rank) == often else pytest.mark.matrix,
        )
        for recipe in STAGES
        for gpus in sizes
        for rank in (0, gpus // 2 - 1, gpus - 1)
    ]


def published(recipe: str) -> dict[str, int]:
    """Returns the numbers of parameters of Hugging Face's classes in the published sizes, and of routers and biases."""
    from architectures import ARCHITECTURES
    from transformers import AutoModel, AutoModelForCausalLM

    architecture = ARCHITECTURES[recipe]
    text = architecture.language
    with torch.device("meta"):
        language, vision = AutoModelForCausalLM.from_config(text), AutoModel.from_config(architecture.vision)
    found = {name: parameter.numel() for name, parameter in language.named_parameters()}
    number, every = (architecture.upcycled[0], architecture.upcycled[2]) if architecture.upcycled else (1, 1)
    mixed = [f".layers.{layer}.mlp." for layer in range(0, text.num_hidden_layers, every)]
    pattern = mixed if architecture.upcycled else [".experts."]
    experts_once = sum(size for name, size in found.items() if any(part in name for part in pattern))
    sizes = {"experts": number * experts_once, "rest": sum(found.values()) - experts_once}
    sizes["vision"] = sum(parameter.numel() for parameter in vision.parameters())
    experts = architecture.upcycled[0] if architecture.upcycled else experts_of(text)
    layers = text.num_hidden_layers // (architecture.upcycled[2] if architecture.upcycled else 1)
    if architecture.upcycled:  # Phi has no routers; they come with biases, as all its linear layers do
        sizes["routers"] = layers * experts * (text.hidden_size + 1)
        sizes["rest"] += sizes["routers"]
    return sizes | {"biases": layers * 2 * experts}


def experts_of(text: Any) -> int:
    """Returns the number of experts per layer."""
    return getattr(text, "num_local_experts", None) or text.num_experts


@pytest.mark.parametrize(("recipe", "gpus", "rank"), ranks_of((8, 64), often=("mixtral_8x7b_internvit", 64, 63)))
def test_a_ranks_sizes_follow_from_the_published_sizes_and_the_parallel_layout(tmp_path, recipe, gpus, rank):
    held, sizes = held_by(recipe, gpus, rank, tmp_path), published(recipe)
    expert_parallel = 1 if recipe == "moe_llava_phi" else 8
    offloaded = expert_parallel == 8 and gpus == 8
    parameters = held["parameters"]
    assert set(held["devices"]) == {"meta"}, "a part of the model was left on the host"
    assert parameters["experts"] == sizes["experts"] / expert_parallel
    assert (parameters["rest"], parameters["vision"]) == (sizes["rest"], sizes["vision"])
    assert parameters.get("biases", 0) == (0 if offloaded else sizes["biases"])

    # CLIP's tower has a buffer of position ids: 24 x 24 patches and the class token.
    assert held["buffers"] == (24 * 24 + 1 if recipe == "moe_llava_phi" else 0)

    trained = sizes["routers"] if recipe == "moe_llava_phi" else parameters["rest"] + parameters["connector"]
    trained += parameters.get("biases", 0)
    padding = held["gradients"]["dense"] - trained  # parameters begin at multiples of 64 elements, shards are even
    assert held["gradients"]["experts"] == parameters["experts"] and 0 <= padding < 64 * 1000

    # The distributed optimizer shards the experts over their replicas, and everything else over all ranks.
    shard = parameters["experts"] / (gpus // expert_parallel) + trained / gpus
    assert abs(held["optimizer"] - shard) <= padding
    assert held["optimizers"] == ["HybridDeviceOptimizer" if offloaded else "AdamW"]
    assert set(held["dtypes"]) == {"torch.bfloat16" if offloaded else "torch.float32"}


# Layouts of the planner, each on its first, middle and last rank.
PLANNED = {
    "64, experts and replicas": dict(gpus=64, expert=8),
    "64, tensor and virtual stages": dict(gpus=64, tensor=2, pipeline=4, chunks=4, expert=8),
    "256, everything": dict(gpus=256, tensor=2, pipeline=4, expert=8, expert_tensor=2),
    "256, deep": dict(gpus=256, pipeline=16, chunks=2, expert=8),
    "1024, context": dict(gpus=1024, tensor=4, pipeline=8, context=2, expert=8),
}
PLANS = [
    pytest.param(
        name,
        place,
        id=f"{name}, {place} rank",
    )
    for name in PLANNED
    for place in ("first", "middle", "last")
]


def coordinates(layout: Layout, rank: int) -> Place:
    """Returns a rank's place: Megatron's order is tensor, context, data, pipeline; of experts tensor, expert, data."""
    per_stage = layout.gpus // layout.pipeline
    within = rank % per_stage
    return Place(rank // per_stage, within // layout.tensor, within // (layout.expert_tensor * layout.expert))


def differences(shape: ModelShape, layout: Layout, rank: int, held: dict) -> dict[str, tuple[int, int]]:
    """Returns the numbers of elements that a rank holds and that were planned, of what differs."""
    where = coordinates(layout, rank)
    kept = [item for chunk in held_parameters(shape, layout, where.stage) for item in chunk]
    laid_out = buffers(shape, layout, where.stage)
    compared = {"weights": (sum(held["parameters"].values()), sum(size for _, size in kept))}
    for kind, experts in (("dense", False), ("experts", True)):
        planned = sum(buffer.elements for buffer in laid_out if buffer.experts == experts)
        compared[f"gradients, {kind}"] = held["gradients"].get(kind, 0), planned
    compared["optimizer"] = held["optimizer"], sum(owned(layout, where, buffer) for buffer in laid_out)
    return {name: sizes for name, sizes in compared.items() if sizes[0] != sizes[1]}


def model_shape(recipe: str, *given: str) -> ModelShape:
    from megatron_smar.commands.plan import recipe_config
    from megatron_smar.conversion.model_shape import describe_shape

    return describe_shape(*recipe_config(ROOT / "examples" / recipe, given))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "place"), PLANS)
def test_a_rank_of_a_large_world_holds_other_numbers_than_planned(tmp_path, name, place):
    layout, batch, recipe = Layout(**PLANNED[name]), Batch(4096, 1024), "mixtral_8x7b_internvit"
    rank = {"first": 0, "middle": layout.gpus // 2 - 1, "last": layout.gpus - 1}[place]
    shape = model_shape(recipe, "--freeze", "vision")
    held = held_by(recipe, 64, rank, tmp_path, layout.flags(shape, batch), layout.gpus)
    assert not differences(shape, layout, rank, held)


@pytest.mark.matrix
@pytest.mark.parametrize(("recipe", "gpus", "rank"), ranks_of((256, 1024), often=("qwen3_30b_a3b_internvl", 1024, 511)))
def test_a_rank_of_a_recipes_large_layout_holds_other_numbers_than_planned(tmp_path, recipe, gpus, rank):
    held = held_by(recipe, gpus, rank, tmp_path)
    _, given = command_on_gpus(recipe, STAGES[recipe][-1], gpus, tmp_path, DATA=str(tmp_path))
    from megatron_smar.commands.plan import recipe_flags

    shape = model_shape(recipe, *recipe_flags(ROOT / "examples" / recipe))
    layout = layout_of(given, gpus, len(shape.decoder.moe_layers))
    assert not differences(shape, layout, rank, held)


def layout_of(given: Sequence[str], gpus: int, layers: int) -> Layout:
    """Returns the layout of a run's flags."""

    def size(flag: str) -> int:
        return int(given[given.index(flag) + 1]) if flag in given else 1

    pipeline, expert = size("--pipeline-model-parallel-size"), size("--expert-model-parallel-size")
    tensor = size("--tensor-model-parallel-size")
    virtual = "--num-layers-per-virtual-pipeline-stage"
    chunks = layers // (pipeline * size(virtual)) if virtual in given else 1
    experts_of = size("--expert-tensor-parallel-size") if "--expert-tensor-parallel-size" in given else tensor
    return Layout(gpus, tensor, pipeline, chunks, expert=expert, expert_tensor=experts_of)
