# SPDX-License-Identifier: Apache-2.0
"""Tests of the recipes' GPU commands in processes that claim GPUs: small models, with all flags of both GPU layouts.

Without other GPU packages than torch they train, save, resume, evaluate and export. tests/redirected_cuda.py says what
this does not test.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_smar.report.scalars import read_scalars
from tests.cuda_path.recipes import STAGES, command_on_gpus, run_script
from tests.launch import run

CLAIM = "tests/redirected_cuda.py"
STEPS = 6
# Flags that a small model on a CPU needs; all others are as on GPUs.
SMALL = (
    "--global-batch-size 4 --micro-batch-size 1 --seq-length 256 --num-workers 0 --tensorboard-log-interval 1 "
    f"--train-iters {STEPS} --lr 1e-3"
).split()


class Recipe:
    """A recipe's small model, converted by the recipe's script, and its runs on a simulated CUDA device."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.output, self.input = name, root / name, root / name / "input"
        self.stage = STAGES[name][-1]
        run_script(name, "convert", self.output, "--tiny")
        for stage in STAGES[name][:-1]:  # the last stage starts from the previous one
            run_script(name, stage, self.output, "--tiny")

    def train(self, gpus: int, ranks: int, *flags: object) -> list[float]:
        """Runs or resumes the last stage with an 8- or 64-GPU layout's flags; returns the logged losses."""
        program, given = command_on_gpus(self.name, self.stage, gpus, self.output, DATA=str(self.input / "stage2"))
        layout = ["--expert-model-parallel-size", ranks if "--expert-model-parallel-size" in given else 1]
        run(CLAIM, program, *given, *SMALL, *layout, *flags, ranks=ranks)
        return read_scalars(self.output / self.stage / "tensorboard")["lm loss"].values

    def evaluate(self, gpus: int, ranks: int) -> dict[str, Any]:
        """Evaluates the checkpoint with a layout's flags; returns the results of tools/evaluate.py."""
        files = {"TEXT": "text.jsonl", "QUESTIONS": "vqa.json", "IMAGES": "."}
        places = {name: str(self.input / file) for name, file in files.items()}
        program, given = command_on_gpus(self.name, "evaluate", gpus, self.output, **places)
        layout = ["--expert-model-parallel-size", ranks if "--expert-model-parallel-size" in given else 1]
        run(CLAIM, program, *given, "--seq-length", 256, *layout, ranks=ranks)
        return json.loads((self.output / "results.json").read_text())

    def set_aside(self, name: str) -> None:
        """Renames the stage's folder, so that the next run does not resume."""
        (self.output / self.stage).rename(self.output / name)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A function that returns a recipe by its name, creating it on first use."""
    root, made = tmp_path_factory.mktemp("simulated"), {}

    def get(name: str) -> Recipe:
        if name not in made:
            made[name] = Recipe(name, root)
        return made[name]

    return get


CASES = [
    pytest.param(recipe, gpus, ranks, id=f"{recipe}, {gpus} GPUs' flags on {ranks}", marks=marks)
    for recipe in STAGES
    for gpus, ranks in ((8, 2), (64, 1), (8, 1), (64, 2))
    for marks in [() if (recipe, gpus, ranks) == ("moe_llava_phi", 8, 1) else pytest.mark.matrix]
]


@pytest.mark.parametrize(("recipe", "gpus", "ranks"), CASES)
def test_with_a_recipes_gpu_flags_a_resumed_run_has_the_losses_of_an_uninterrupted_one(recipes, recipe, gpus, ranks):
    case = recipes(recipe)
    uninterrupted = case.train(gpus, ranks)
    case.set_aside(f"{gpus}-on-{ranks}-uninterrupted")
    case.train(gpus, ranks, "--exit-interval", STEPS // 2)
    resumed = case.train(gpus, ranks)
    case.set_aside(f"{gpus}-on-{ranks}")
    assert len(uninterrupted) == STEPS and resumed == uninterrupted


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", STAGES)
def test_a_model_trained_on_a_simulated_device_evaluates_and_exports(recipes, recipe):
    case = recipes(recipe)
    case.train(64, 2)
    on_simulated = case.evaluate(64, 2)
    run_script(recipe, "evaluate", case.output, "--tiny")  # exports, verifies the export, and evaluates in float32
    on_cpu = json.loads((case.output / "results.json").read_text())
    case.set_aside("evaluated")
    assert on_simulated["text_perplexity"] == pytest.approx(on_cpu["text_perplexity"], rel=0.02)  # bf16 on one side
