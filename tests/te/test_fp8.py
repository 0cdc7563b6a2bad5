# SPDX-License-Identifier: Apache-2.0
"""Tests of FP8 without a device: recipes are created and their contexts entered; no value is ever cast."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.launch import run
from tests.te.building import build, parse, tensors_of

# Transformer Engine's class, and the minimum compute capability.
RECIPES = {
    "delayed": ("DelayedScaling", (8, 9)),
    "tensorwise": ("Float8CurrentScaling", (8, 9)),
    "blockwise": ("Float8BlockScaling", (9, 0)),
    "mxfp8": ("MXFP8BlockScaling", (10, 0)),
}
FP8 = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe"]


def claim_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    from transformer_engine.pytorch import quantization, utils

    properties = SimpleNamespace(major=capability[0], minor=capability[1], name="simulated", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    for module in (quantization, utils):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_created_and_its_context_entered_for_a_model(recipe, one_rank, tower, monkeypatch):
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_smar import runtime

    kind, capability = RECIPES[recipe]
    claim_capability(monkeypatch, capability)
    args = parse("mixtral", tower, *FP8, recipe, "--moe-grouped-gemm")
    runtime.check_flags(args)
    model = build(args)
    made = get_fp8_recipe(model.config)
    assert isinstance(made, getattr(recipes, kind))
    with get_fp8_context(model.config, layer_no=0):
        assert FP8GlobalStateManager.is_fp8_enabled()
        assert isinstance(FP8GlobalStateManager.get_fp8_recipe(), getattr(recipes, kind))
    assert not FP8GlobalStateManager.is_fp8_enabled()
    assert tensors_of(model) == tensors_of(build(parse("mixtral", tower, "--bf16"))), "its checkpoint differs"


def test_a_recipe_that_the_gpu_does_not_support_is_refused(one_rank, tower, monkeypatch):
    from megatron_smar import runtime

    args = parse("mixtral", tower, *FP8, "mxfp8")
    claim_capability(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match=r"--fp8-recipe mxfp8 needs a card of compute capability 10\.0"):
        runtime.check_flags(args)
    args.fp8_recipe = "bogus"  # cannot come from the command line
    with pytest.raises(ValueError, match="--fp8-recipe is 'bogus'; it must be one of delayed, tensorwise, blockwise"):
        runtime.check_flags(args)


def test_training_ends_with_one_sentence_for_a_recipe_that_the_gpu_does_not_support(world):
    flags = [*world.flags, *BOGUS[:-1], "mxfp8", "--make-vocab-size-divisible-by", 1]
    done = run("tests/redirected_cuda.py", "pretrain_vlm.py", *flags, check=False)
    said = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode != 0 and len(said) == 1 and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert "--fp8-recipe mxfp8 needs a card of compute capability 10.0, and simulated H100 has 9.0" in said[0]
    assert "give --fp8-recipe delayed or tensorwise or blockwise, or train in bf16" in said[0]


BOGUS = ["--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 2, *FP8, "bogus"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("installed", [True, False], ids=["with Transformer Engine", "without it"])
def test_a_recipe_that_does_not_exist_ends_with_one_sentence(world, device, installed, request, monkeypatch):
    """Megatron's own config accepts any string."""
    if not installed:
        monkeypatch.setattr(sys, "executable", str(request.getfixturevalue("python_without_te")))
    start = ["tests/redirected_cuda.py"] if device == "cuda" else []
    done = run(*start, "pretrain_vlm.py", *world.flags, *BOGUS, check=False)
    said = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode != 0 and len(said) == 1, done.stdout[-3000:]
    assert said[0].startswith("pretrain_vlm.py: error: argument --fp8-recipe: invalid choice: 'bogus' (choose from ")
    assert all(recipe in said[0] for recipe in RECIPES)
    assert "Traceback" not in done.stdout
