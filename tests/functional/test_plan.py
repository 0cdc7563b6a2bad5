# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/plan.py as a user runs it."""

import json

import pytest

from tests.launch import run

RECIPE = "examples/mixtral_8x7b_internvit"


def test_the_best_layouts_of_a_recipe_are_not_planned_or_not_drawn(tmp_path):
    page = tmp_path / "plan.html"
    done = run("tools/plan.py", "layouts", RECIPE, "--gpus", 8, "--best", 3, "--html", page, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(result["plans"]) == 3 and all(plan["fits"] for plan in result["plans"])
    assert "the fastest" in result["plans"][0]["reason"] and "--seq-length" in result["flags"]
    assert "47.0 billion parameters, 8 x H100" in done.stdout
    content = page.read_text()
    assert content.count("<svg") == 2 and "Memory by part" in content and result["plans"][0]["layout"] in content


@pytest.mark.matrix
def test_the_recipes_own_layout_is_not_among_those_that_fit():
    """EP 8 and data parallelism with all layers recomputed, as its stage2.yaml says."""
    only = ("--only", "tensor=1", "pipeline=1", "expert=8", "recompute=full", "micro-batch=1")
    done = run("tools/plan.py", "layouts", RECIPE, "--gpus", 64, *only, "offload=false", "--json")
    (plan,) = json.loads(done.stdout.strip().splitlines()[-1])["plans"]
    assert plan["fits"] and plan["layout"] == "EP8 DP64 MBS1 recompute all"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((".", "--gpus", 8), "has no model: give the folder of a recipe"),
        ((RECIPE, "--gpus", 8, "--only", "tensor"), "--only tensor: give NAME=VALUE"),
        ((RECIPE, "--gpus", 8, "--efficiency", 2), "the cluster's efficiency is 2.0"),
        ((RECIPE, "--gpus", 8, "--global-batch-size", 0), "give at least 1"),
        ((RECIPE, "--gpus", 7), "no layout of 7 GPUs is possible"),
        ((RECIPE, "--gpus", 8, "--", "--freeze", "eyes"), "eyes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_not_refused_in_one_sentence(words, sentence):
    done = run("tools/plan.py", "layouts", *words, check=False)
    assert done.returncode == 2 and sentence in done.stdout and "Traceback" not in done.stdout
