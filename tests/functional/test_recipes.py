# SPDX-License-Identifier: Apache-2.0
"""Tests that run the recipes' scripts with --tiny like a user: from Hugging Face folders to evaluation results."""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_smar.model.parts import part_of
from megatron_smar.report.scalars import read_scalars
from tests.launch import ROOT, load_weights, users_environment

# A whole run takes minutes; in `make test`, tests/cuda_path converts and trains one of them with its GPU flags.
pytestmark = pytest.mark.matrix
# Recipe -> its stages, each with the parts that are trained.
ALL = {"connector", "embeddings", "attention", "norms", "experts", "router"}
STAGES = {
    "mixtral_8x7b_internvit": {"stage1": {"connector"}, "stage2": ALL},
    "qwen3_30b_a3b_internvl": {"stage1": {"connector"}, "stage2": ALL},
    "moe_llava_phi": {"stage3": {"experts", "router"}},
}
# SMAR's band in each stage, as Megatron lists it among all flags at the start.
BANDS = {"stage1": None, "stage2": (1.5, 2.0), "stage3": (1.0, 1.5)}


def run_script(recipe: str, script: str, output: Path, *options: str, **environment: str):
    """Runs one script, with a timeout."""
    return subprocess.run(
        ["bash", ROOT / "examples" / recipe / script, *options],
        env=users_environment() | {"PYTHON": sys.executable, "OUTPUT": str(output)} | environment,
        cwd=output.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def run_recipe(recipe: str, output: Path) -> Path:
    """Runs all of a recipe's scripts and returns the output folder."""
    for script in ("convert.sh", *(f"{stage}.sh" for stage in STAGES[recipe]), "evaluate.sh"):
        done = run_script(recipe, script, output, "--tiny")
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-6000:]}"
    return output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Callable[[str], Path]:
    """Returns a function that runs a recipe once and returns its output folder."""
    root = tmp_path_factory.mktemp("recipes")
    return functools.cache(lambda recipe: run_recipe(recipe, root / recipe))


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's weights by name."""
    latest = (checkpoint / "latest_checkpointed_iteration.txt").read_text()
    folder = latest if latest == "release" else f"iter_{int(latest):07d}"
    return {name: value for name, value in load_weights(checkpoint / folder).items() if "_extra_state" not in name}


def flags_of(file: Path) -> dict[str, str]:
    """Returns the flags in effect, from the run's list of arguments."""
    return dict(re.findall(r"^ *(\w+) \.{3,} *(\S+)", file.read_text(), flags=re.MULTILINE))


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Returns the parts with a changed weight; the vocabulary's padding is ignored."""
    assert before.keys() == after.keys()
    return {part_of(n) for n, value in before.items() if not torch.equal(value, after[n][: len(value)].to(value.dtype))}


@pytest.mark.parametrize("recipe", STAGES)
def test_a_recipe_runs_from_conversion_to_results_and_trains_exactly_the_named_parts(outputs, recipe):
    output = outputs(recipe)
    before = weights_of(output / "start")
    for stage, trained in STAGES[recipe].items():
        after, scalars = weights_of(output / stage), read_scalars(output / stage / "tensorboard")
        assert changed_parts(before, after) == trained, f"{stage} trained other parts than it says"
        assert all(map(math.isfinite, scalars["lm loss"].values))
        assert len(scalars["lm loss"].values) >= 5
        flags = flags_of(output / stage / "arguments.txt")
        assert flags["modality_routing"] == ("smar" if BANDS[stage] else "none")
        assert BANDS[stage] in (None, (float(flags["smar_d_min"]), float(flags["smar_d_max"])))
        biases = torch.cat([value.flatten() for name, value in after.items() if name.endswith("modality_bias.bias")])
        assert biases.any() == (stage != "stage1"), f"SMAR acts in {stage}" if biases.any() else f"none in {stage}"
        before = after
    results = json.loads((output / "results.json").read_text())
    assert math.isfinite(results["text_perplexity"])
    assert len(results["mrd_distance_by_layer"]) == sum(name.startswith("moe/mrd_distance_layer_") for name in scalars)


@pytest.mark.parametrize("recipe", [recipe for recipe in STAGES if recipe != "moe_llava_phi"])
def test_the_exported_model_loads_in_transformers_with_every_weight(outputs, recipe):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    (folder,) = (outputs(recipe) / "export").glob("stage2_*")
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The license", return_tensors="pt")
    answer = model.generate(input_ids=prompt["input_ids"], max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_the_pilot_trains_biases_resumes_and_exports(outputs):
    output = outputs("mixtral_8x7b_internvit")
    done = run_script("mixtral_8x7b_internvit", "pilot.sh", output, "--tiny")
    assert done.returncode == 0, done.stdout[-6000:]
    after = weights_of(output / "pilot")
    assert changed_parts(weights_of(output / "start"), after) == ALL - {"experts"}
    assert all(value.any() for name, value in after.items() if name.endswith("modality_bias.bias"))
    log = (output / "logs" / "pilot.log").read_text()
    assert "holds this run up to step 10: it resumes there" in log
    assert all(f"validation loss at iteration {step} " in log for step in (10, 20))
    assert (output / "export" / "pilot_20" / "config.json").is_file()


@pytest.mark.parametrize("recipe", STAGES)
def test_options_reach_the_launcher_and_flags_the_program(tmp_path, recipe):
    output, stage = with_a_model(tmp_path, recipe)
    options = (
        "--gpus",
        "64",
        "--slurm",
        "--dry-run",
        "--time",
        "24:00:00",
        "--sbatch=--account=NAME",
        "--",
        "--lr",
        "1",
    )
    done = run_script(recipe, f"{stage}.sh", output, *options, DATA="shards")
    assert done.returncode == 0, done.stdout
    wanted = "nodes=8", "ntasks-per-node=8", "cpus-per-task=12", "time=24:00:00", "account=NAME", "mem=0", "requeue"
    assert {f"#SBATCH --{option}" for option in wanted} < set(done.stdout.splitlines())
    (command,) = re.findall(r"^python \S*pretrain_vlm\.py .*$", done.stdout, flags=re.MULTILINE)
    assert (
        command.endswith("--data-path shards --lr 1")
        and f"--layout 64 --num-layers 2 --vision-model {output}" in command
    )
    assert f"--save {output / stage}" in command


def with_a_model(folder: Path, recipe: str) -> tuple[Path, str]:
    """Writes the files of convert.sh that the checks look at; returns the output folder and the first stage."""
    output = folder / "output"
    (output / "start").mkdir(parents=True)
    (output / "start" / "flags.txt").write_text("--num-layers 2\n")
    (output / "start" / "latest_checkpointed_iteration.txt").write_text("release")
    return output, next(iter(STAGES[recipe]))


MISTAKES = {
    "another number of GPUs": (("--gpus", "12"), {}, "--gpus is 12; there are layouts for 8, 64, 256 and 1024."),
    "no model": ((), {}, "holds no converted model; run convert.sh first"),
    "nodes without SLURM": (("--gpus", "64"), {"DATA": "x"}, "the run needs 8 nodes: submit it to SLURM"),
    "a flag before the --": (
        ("--lr", "1"),
        {"DATA": "x"},
        "--lr is no option of local; the command and its flags come",
    ),
    "no data": ((), {}, "DATA is not set; set it to shards of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("recipe", STAGES)
def test_a_script_says_in_one_sentence_what_is_missing(tmp_path, recipe, mistake):
    options, environment, said = MISTAKES[mistake]
    output, stage = tmp_path / "output", next(iter(STAGES[recipe]))
    if mistake != "no model":
        with_a_model(tmp_path, recipe)
    done = run_script(recipe, f"{stage}.sh", output, *options, **environment)
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1 and re.match(rf"({stage}.sh|launch.py): error: ", done.stdout), done.stdout
    assert said in done.stdout
