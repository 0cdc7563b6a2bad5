# SPDX-License-Identifier: Apache-2.0
"""With --max-skipped-steps a step that is not finite is left out as if it had not been, and more than that stop."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_smar.checkpoint.metadata import run_arguments
from tests.functional.test_faulty_steps import EXPERT, LAYOUTS
from tests.launch import run_each_rank

DRIVER = "tests/functional/faulty_run.py"
STEPS = "--micro-batch-size 2 --global-batch-size 8 --num-workers 0 --save-interval 1".split()
# Biases that are updated once per step: those of a strategy, and Megatron's own.
BIASES = {
    "strategy.bias": "--modality-routing ernie --moe-router-topk 1 --moe-router-pre-softmax".split(),
    "expert_bias": "--moe-router-enable-expert-bias --moe-router-score-function sigmoid".split(),
}


def train(world, monkeypatch, fault, save, *flags, ranks=2, steps=4, check=True):
    """Trains with a fault, and returns the output of all ranks."""
    monkeypatch.setenv("FAULT", fault)
    command = [DRIVER, *world.flags, *STEPS, "--train-iters", steps, "--save", save, *flags]
    return [done.stdout for done in run_each_rank(*command, ranks=ranks, check=check, timeout=200)]


def tensors(folder):
    """Returns every tensor of a checkpoint: weights, buffers, the optimizer's state."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(data.size, dtype=data.properties.dtype)
        for name, data in stored.items()
        if isinstance(data, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert any("exp_avg" in name for name in found)
    return found


def changed(before, after):
    """Returns the names of the tensors that differ between two checkpoints."""
    before, after = tensors(before), tensors(after)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def warnings(output):
    return re.findall(r"WARNING: (iteration \d+ is skipped .*)", output)


@pytest.mark.matrix
@pytest.mark.parametrize("bias", ["strategy.bias", "expert_bias"])
def test_a_skipped_step_changes_nothing_is_counted_and_the_count_survives_a_resume(world, tmp_path, monkeypatch, bias):
    flags = ["--expert-model-parallel-size", 2, "--use-distributed-optimizer", "--max-skipped-steps", 1, *BIASES[bias]]
    outputs = train(world, monkeypatch, f"gradient,2,nan,{EXPERT}", tmp_path, *flags, steps=3)
    (said,) = warnings(outputs[0])
    assert said.startswith("iteration 2 is skipped (1 of --max-skipped-steps 1), since its gradient, not its loss, is ")
    assert EXPERT in said and "(rank 0)" in said and "; its samples: data-parallel rank 0: " in said
    assert "number of skipped iterations: 1 " in re.sub(" +", " ", outputs[1]).replace(" |", " ")
    steps = [tmp_path / f"iter_{step:07d}" for step in (1, 2, 3)]
    assert not changed(*steps[:2])
    moved = changed(*steps[1:])
    assert any(bias in name for name in moved)
    assert all(value.isfinite().all() for value in tensors(steps[2]).values())
    assert run_arguments(steps[2], None).skipped_steps == [2]
    resumed = [*flags, "--load", tmp_path]
    outputs = train(world, monkeypatch, "loss,5,inf,", tmp_path, *resumed, steps=6, check=False)
    (said,) = {sentence for output in outputs for sentence in re.findall(r"error: (step .*)", output)}
    assert said.startswith("step 5 was not applied, since its loss is NaN or infinite; ")
    assert "1 step has been skipped already (--max-skipped-steps 1)" in said


@pytest.mark.matrix
def test_a_run_that_skips_a_step_is_that_in_which_the_step_was_not_applied(world, tmp_path, monkeypatch):
    faulty, left_out = tmp_path / "faulty", tmp_path / "left_out"
    outputs = train(world, monkeypatch, "loss,2,inf,", faulty, "--max-skipped-steps", 2)
    (said,) = warnings(outputs[0])
    assert "since its loss is NaN or infinite" in said and "data-parallel rank 1: " in said
    assert "data-parallel rank 0: " not in said, "not only the samples whose loss is at fault"
    train(world, monkeypatch, "unapplied,2,,", left_out)
    assert not changed(faulty / "iter_0000004", left_out / "iter_0000004")


@pytest.mark.matrix
@pytest.mark.parametrize("checks", [[], ["--no-check-for-nan-in-loss-and-grad"], ["--rerun-mode", "disabled"]])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("fault", ["gradient,{},nan,connector", "loss,{},inf,"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_skips_the_same_step_on_all_ranks(world, tmp_path, monkeypatch, layout, fault, step, checks):
    ranks, flags = LAYOUTS[layout]
    allowed = ["--max-skipped-steps", 1, *checks]
    train(world, monkeypatch, fault.format(step), tmp_path / "a", *flags, *allowed, ranks=ranks)
    train(world, monkeypatch, f"unapplied,{step},,", tmp_path / "b", *flags, *checks, ranks=ranks)
    assert not changed(tmp_path / "a" / "iter_0000004", tmp_path / "b" / "iter_0000004")


@pytest.mark.matrix
def test_a_nan_in_a_weight_is_not_skipped(world, tmp_path, monkeypatch):
    outputs = train(
        world, monkeypatch, f"weight,0,nan,{EXPERT}", tmp_path, "--max-skipped-steps", 9, ranks=1, check=False
    )
    assert "error: step 1 was not applied, since its loss" in outputs[0] and not warnings(outputs[0])
