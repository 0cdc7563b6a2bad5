# SPDX-License-Identifier: Apache-2.0
"""An optimizer's state that cannot be taken up is refused, in one sentence, before Megatron loads anything."""

import shutil
from argparse import Namespace

import pytest

from megatron_smar.checkpoint.fit import (
    MODEL_PARALLEL,
    CheckpointMismatchError,
    check_optimizer,
    leave_other_random_state,
    resumed_state,
)

LOADING = dict(ckpt_step=None, finetune=False, no_load_optim=False, skip_train=False, use_distributed_optimizer=False)
LOADING |= dict(lr=1e-3, min_lr=0.0)  # as `trained` was


def check(folder, **changes):
    sizes = dict.fromkeys(MODEL_PARALLEL.values(), 1)
    args = Namespace(**LOADING | sizes | {"load": str(folder)} | changes)
    check_optimizer(args, resumed_state(args))


REFUSED = {
    "plain": (dict(use_distributed_optimizer=True), ["--use-distributed-optimizer", "leave the flag out"]),
    "sharded": ({}, ["give --use-distributed-optimizer"]),
    "as it lies": (
        dict(use_distributed_optimizer=True, tensor_model_parallel_size=2, expert_model_parallel_size=4),
        ["--no-dist-ckpt-optim-fully-reshardable under no model parallelism", "does not fit TP 2, EP 4"],
    ),
    "at one rate": (dict(lr=2e-3), ["--lr was 0.001, not 0.002"]),
    "weights": ({}, ["--no-save-optim", "--finetune"]),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_state_that_megatron_cannot_take_up_is_refused_with_the_mend(trained, form):
    changes, said = REFUSED[form]
    form = "plain" if form == "at one rate" else form
    with pytest.raises(CheckpointMismatchError) as refusal:
        check(trained[form], **changes)
    for part in [*said, str(trained[form]), "--no-load-optim"]:
        assert part in str(refusal.value)
    for without in ("finetune", "no_load_optim", "skip_train"):
        check(trained[form], **changes | {without: True})


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("plain", dict(tensor_model_parallel_size=2)),
        ("sharded", dict(use_distributed_optimizer=True, tensor_model_parallel_size=2)),
        ("as it lies", dict(use_distributed_optimizer=True)),
        ("as it lies", dict(use_distributed_optimizer=True, ckpt_step=1)),
    ],
)
def test_a_state_that_fits_is_let_through(trained, form, changes):
    check(trained[form], **changes)


def test_nothing_to_load_is_nothing_to_refuse(tmp_path):
    check(tmp_path, use_distributed_optimizer=True)
    args = Namespace(**LOADING, load=None)
    check_optimizer(args, resumed_state(args))


def test_a_damaged_checkpoint_is_refused_in_a_sentence_of_its_own(trained, tmp_path):
    damaged = shutil.copytree(trained["plain"], tmp_path / "damaged")
    (damaged / "iter_0000002" / ".metadata").write_bytes(b"cut off")
    with pytest.raises(CheckpointMismatchError, match=r"cannot be continued: .*\.metadata cannot be read"):
        check(damaged)


@pytest.mark.parametrize(("now", "left"), [("cpu", False), ("cuda", True)])
def test_generators_of_another_kind_of_device_are_left_and_that_is_said(trained, capsys, now, left):
    """`trained` was saved on the CPU: its generators' states have 5,056 bytes, and CUDA takes 16."""
    args = Namespace(**LOADING, load=str(trained["plain"]), no_load_rng=False, program={"device": now})
    leave_other_random_state(args, resumed_state(args))
    assert args.no_load_rng == left
    assert ("was saved on cpu and this run is on cuda" in capsys.readouterr().out) == left
