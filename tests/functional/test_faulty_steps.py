# SPDX-License-Identifier: Apache-2.0
"""A step that is not finite is never applied or saved, and the run ends on every rank with the same message."""

import re

import pytest

from tests.launch import load_weights, run, run_each_rank

DRIVER = "tests/functional/faulty_run.py"
FOUR_STEPS = ["--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", 4, "--num-workers", 0]
LAYOUTS = {
    "one process": (1, []),
    "tensor": (2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
    "context": (2, ["--context-parallel-size", 2]),
    "pipeline": (2, ["--pipeline-model-parallel-size", 2]),
    "experts, distributed optimizer": (2, ["--expert-model-parallel-size", 2, "--use-distributed-optimizer"]),
    "replicas, no clipping": (2, ["--clip-grad", 0]),
    "replicas, bf16": (2, ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce"]),
}
EXPERT = "experts.local_experts.0.linear_fc1.weight"


def sentence_of(world, monkeypatch, fault, *flags, ranks=1):
    """Runs with a fault and returns the error message, which must be the same on every rank."""
    monkeypatch.setenv("FAULT", fault)
    done = run_each_rank(DRIVER, *world.flags, *FOUR_STEPS, *flags, ranks=ranks, check=False, timeout=200)
    said = [re.findall(r"error: (step .*)", rank.stdout) for rank in done]
    assert all(rank.returncode == 1 for rank in done), done[0].stdout[-3000:]
    assert not any("Traceback" in rank.stdout for rank in done), done[0].stdout[-3000:]
    assert [len(lines) for lines in said] == [1] * ranks and len({lines[0] for lines in said}) == 1, said
    return said[0][0]


def test_a_nan_in_a_weight_stops_the_first_step_and_names_the_weight(world, tmp_path, monkeypatch):
    said = sentence_of(world, monkeypatch, f"weight,0,nan,{EXPERT}", "--save", tmp_path, "--save-interval", 1)
    assert said.startswith("step 1 was not applied, since its loss is NaN or infinite; the weight ")
    assert EXPERT in said and said.endswith("No checkpoint has been saved.")
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize(
    "reruns",
    [
        pytest.param([], id="reruns"),
        pytest.param(["--rerun-mode", "disabled"], id="no reruns", marks=pytest.mark.matrix),
    ],
)
def test_after_a_fault_in_a_later_step_the_newest_checkpoint_is_the_last_good_one(world, tmp_path, monkeypatch, reruns):
    fault = f"gradient,3,nan,{EXPERT}"
    layout = ["--expert-model-parallel-size", 2, "--save", tmp_path, "--save-interval", 1]
    said = sentence_of(world, monkeypatch, fault, *layout, *reruns, ranks=2)
    assert said.startswith("step 3 was not applied, since its gradient, not its loss, is NaN or infinite")
    assert EXPERT in said and said.endswith(f"The newest checkpoint in {tmp_path} is that of step 2.")
    assert sorted(folder.name for folder in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    assert all(weight.isfinite().all() for weight in load_weights(tmp_path / "iter_0000002").values())


@pytest.mark.matrix
def test_an_infinite_loss_on_one_replica_with_a_finite_gradient_stops_all_ranks(world, monkeypatch):
    said = sentence_of(world, monkeypatch, "loss,1,inf,", "--clip-grad", 0, ranks=2)
    assert said.startswith("step 1 was not applied, since its loss is NaN or infinite; every weight is finite")


@pytest.mark.matrix
@pytest.mark.parametrize("checks", [[], ["--no-check-for-nan-in-loss-and-grad"]], ids=["checks", "no checks"])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("fault", ["gradient,{},nan,connector", "gradient,{},inf,layers.0.mlp", "loss,{},inf,"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_applies_a_step_that_is_not_finite(world, tmp_path, monkeypatch, layout, fault, step, checks):
    ranks, flags = LAYOUTS[layout]
    save = ["--save", tmp_path, "--save-interval", 2]
    said = sentence_of(world, monkeypatch, fault.format(step), *flags, *save, *checks, ranks=ranks)
    assert said.startswith(f"step {step} was not applied, since its {'loss' if 'loss' in fault else 'gradient'}")
    assert len(list(tmp_path.glob("iter_*"))) == step // 2


@pytest.mark.matrix
@pytest.mark.parametrize("frozen", ["vision_model", "layers.1.mlp.router.weight"])
def test_a_nan_in_a_frozen_part_stops_the_first_step(world, monkeypatch, frozen):
    said = sentence_of(world, monkeypatch, f"weight,0,nan,{frozen}", "--freeze", "vision", "language", ranks=2)
    assert said.startswith("step 1 was not applied") and frozen in said


@pytest.mark.matrix
def test_a_fault_in_a_copy_that_the_gradient_norm_leaves_out_stops_all_ranks(world, monkeypatch):
    said = sentence_of(world, monkeypatch, "copy,1,nan,connector", *LAYOUTS["tensor"][1], ranks=2)
    assert said.startswith("step 1 was not applied, since its gradient, not its loss,") and "(rank 1)" in said


@pytest.mark.matrix
def test_a_nan_in_a_weight_is_not_skipped_forever_as_an_fp16_overflow(world, tmp_path, monkeypatch):
    flags = ["--fp16", "--use-distributed-optimizer", "--save", tmp_path, "--save-interval", 4]
    said = sentence_of(world, monkeypatch, f"weight,0,nan,{EXPERT}", *flags)
    assert said.startswith("step 1 was not applied, since its loss") and EXPERT in said
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.matrix
def test_the_loss_scaling_of_fp16_still_skips_overflows(world, monkeypatch):
    monkeypatch.setenv("FAULT", f"gradient,2,inf,{EXPERT}")
    done = run(DRIVER, *world.flags, *FOUR_STEPS, "--fp16", "--initial-loss-scale", 1024, ranks=1)
    steps = re.findall(r"iteration +(\d+)/ +4 \|(.*)", done.stdout)
    assert [number for number, line in steps if "number of skipped iterations: 1" in line] == ["2"] and len(steps) == 4
