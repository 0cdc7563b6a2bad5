# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that a run cannot resume with its flags is refused in one sentence, before Megatron loads anything."""

import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_smar.checkpoint.continuation import MODEL_PARALLEL, check_continuation
from megatron_smar.checkpoint.fit import CheckpointMismatchError, leave_other_random_state, resumed_state

# The flags with which the checkpoints of `trained` are resumed.
LOADING = dict(ckpt_step=None, finetune=False, no_load_optim=False, skip_train=False, use_distributed_optimizer=False)
LOADING |= dict(override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False, save=None)


def arguments(folder, **changes):
    """Returns the arguments that a run was saved with, with some changed."""
    args = Namespace(ckpt_step=None, load=str(folder), finetune=False, skip_train=False)
    state = resumed_state(args)
    saved = vars(state["args"]) if state else {}
    sizes = dict.fromkeys(MODEL_PARALLEL.values(), 1)
    return Namespace(**saved | LOADING | sizes | {"load": str(folder)} | changes)


def check(folder, **changes):
    args = arguments(folder, **changes)
    check_continuation(args, resumed_state(args))
    return args


REFUSED = {
    "plain": (dict(use_distributed_optimizer=True), ["--use-distributed-optimizer", "leave the flag out"]),
    "sharded": ({}, ["give --use-distributed-optimizer"]),
    "as stored": (
        dict(use_distributed_optimizer=True, tensor_model_parallel_size=2, expert_model_parallel_size=4),
        ["--no-dist-ckpt-optim-fully-reshardable under no model parallelism", "does not fit TP 2, EP 4"],
    ),
    "another rate": (dict(lr=2e-3), ["--lr was 0.001, not 0.002"]),
    "another floor": (dict(min_lr=1e-5), ["--min-lr was 0.0, not 1e-05"]),
    "another optimizer": (dict(optimizer="sgd"), ["--optimizer was adam, not sgd"]),
    "half precision": (
        dict(bf16=True, decoupled_lr=1e-3, decoupled_min_lr=0.0),
        ["these flags: --bf16 was False, not True; give the same"],
    ),
    "other frozen parts": (dict(freeze=["vision", "language"]), ["--freeze was vision, not vision language"]),
    "nothing frozen": (dict(freeze=[]), ["--freeze was vision, not nothing"]),
    "weights": ({}, ["--no-save-optim", "--finetune"]),
}


@pytest.mark.parametrize("form", REFUSED)
def test_an_optimizer_state_that_megatron_cannot_load_is_refused_with_the_fix(trained, form):
    changes, said = REFUSED[form]
    folder = trained.get(form, trained["plain"])
    with pytest.raises(CheckpointMismatchError) as refusal:
        check(folder, **changes)
    for part in [*said, str(folder), "--no-load-optim", "to start a new run from its weights, give --finetune"]:
        assert part in str(refusal.value)
    with pytest.raises(CheckpointMismatchError) as refusal:
        check(folder, save=f"{folder}/", **changes)
    assert "new run" not in str(refusal.value), "a new run cannot be started in the same folder"
    for without in ("finetune", "no_load_optim", "skip_train"):
        check(folder, **changes | {without: True})


LOSSES = {None: {}, "sqrt": dict(loss_weighting="sqrt"), "per token": dict(calculate_per_token_loss=True)}


@pytest.mark.parametrize("before", LOSSES)
@pytest.mark.parametrize("after", LOSSES)
def test_another_mean_of_the_losses_is_refused_with_both_values(trained, before, after):
    args = arguments(trained["plain"])
    state = resumed_state(args)
    vars(state["args"]).update(LOSSES[before])
    vars(args).update(dict(loss_weighting=None, calculate_per_token_loss=False) | LOSSES[after])
    if before == after:
        check_continuation(args, state)
        return
    with pytest.raises(CheckpointMismatchError, match="minimized another mean of the losses: --") as refusal:
        check_continuation(args, state)
    if "sqrt" in (before, after):
        was, now = (LOSSES[mean].get("loss_weighting") for mean in (before, after))
        assert f"--loss-weighting was {was}, not {now}" in str(refusal.value)
    if "per token" in (before, after):
        assert f"--calculate-per-token-loss was {before == 'per token'}" in str(refusal.value)
    args.no_load_optim = True
    check_continuation(args, state)


def test_a_checkpoint_from_before_the_flag_is_resumed_without_it(trained):
    args = arguments(trained["plain"])
    state = resumed_state(args)
    del state["args"].loss_weighting
    check_continuation(args, state)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("plain", dict(tensor_model_parallel_size=2)),
        ("plain", dict(freeze=["vision", "vision"])),
        ("sharded", dict(use_distributed_optimizer=True, tensor_model_parallel_size=2)),
        ("as stored", dict(use_distributed_optimizer=True)),
        ("as stored", dict(use_distributed_optimizer=True, ckpt_step=1)),
    ],
)
def test_an_optimizer_state_that_fits_is_accepted(trained, form, changes):
    check(trained[form], **changes)


def test_a_run_without_a_checkpoint_to_load_is_not_refused(tmp_path):
    check_continuation(Namespace(), None)
    assert resumed_state(Namespace(load=str(tmp_path), ckpt_step=None, finetune=False, skip_train=False)) is None
    assert resumed_state(Namespace(load=None, ckpt_step=None, finetune=False, skip_train=False)) is None


# The flags of a schedule: 100 steps of 8 samples, 10 of them warm-up.
COSINE = dict(
    lr_decay_style="cosine", train_iters=100, global_batch_size=8, lr_warmup_iters=10, lr_warmup_fraction=None
)
COSINE |= dict(train_samples=None, lr_decay_iters=None, lr_decay_samples=None, lr_warmup_samples=0, no_load_optim=False)
COSINE |= dict(weight_decay=0.1, start_weight_decay=0.1, end_weight_decay=0.1, weight_decay_incr_style="constant")
COSINE |= dict(
    rampup_batch_size=None,
    step_batch_size_schedule=None,
    lr=1e-3,
    min_lr=1e-5,
    lr_warmup_init=0.0,
    lr_wsd_decay_iters=None,
)
COSINE |= dict(lr_wsd_decay_style="exponential", lr_wsd_decay_samples=None)
CONSTANT = COSINE | dict(lr_decay_style="constant")


def scheduler(args):
    """Builds Megatron's scheduler for these flags, as Megatron's trainer builds it."""
    import megatron.training.training as trainer

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    flags = Namespace(**vars(args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "get_args", lambda: flags)
        return trainer.get_optimizer_param_scheduler(optimizer), optimizer, flags


def saved_at(step, **flags):
    """Returns what a run's checkpoint stores of the schedule at a step."""
    args = Namespace(**flags, override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False)
    schedule, _, args = scheduler(args)
    schedule.step(step * args.global_batch_size)
    return {"args": args, "iteration": step, "opt_param_scheduler": schedule.state_dict()}


def resume_schedule(state, **flags):
    """Returns the schedule with which Megatron resumes, and its optimizer."""
    from megatron_smar.checkpoint.continuation import check_schedule

    defaults = dict(
        override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False, load="run", save="run"
    )
    args = Namespace(**defaults | flags)
    check_schedule(args, state)
    resumed, optimizer, _ = scheduler(args)
    resumed.load_state_dict(state["opt_param_scheduler"])
    return resumed, optimizer


ANOTHER_SCHEDULE = {
    "more steps": (dict(train_iters=200), ["--train-iters was 100, not 200"]),
    "another batch": (dict(global_batch_size=16), ["--global-batch-size was 8, not 16"]),
    "another style": (dict(lr_decay_style="linear"), ["--lr-decay-style was cosine, not linear"]),
    "another end of the decay": (dict(lr_decay_iters=50), ["--lr-decay-iters was 100, not 50"]),
    "another warm-up": (dict(lr_warmup_iters=20), ["--lr-warmup-iters was 10, not 20"]),
    "warm-up as a share": (
        dict(lr_warmup_iters=0, lr_warmup_fraction=0.2),
        ["--lr-warmup-fraction was None, not 0.2", "--lr-warmup-iters was 10, not 0"],
    ),
    "weight decay": (dict(weight_decay=0.0, start_weight_decay=0.0, end_weight_decay=0.0), ["--weight-decay was 0.1"]),
    "weight decay that grows": (
        dict(weight_decay_incr_style="linear", end_weight_decay=0.2),
        ["--end-weight-decay was None, not 0.2", "--weight-decay-incr-style was constant, not linear"],
    ),
    "in samples": (dict(train_iters=None, train_samples=1600), ["--train-samples was None, not 1600"]),
}


@pytest.mark.parametrize("change", ANOTHER_SCHEDULE)
def test_another_schedule_is_refused_with_both_values_unless_a_flag_says_which_applies(change):
    flags, said = ANOTHER_SCHEDULE[change]
    state = saved_at(50, **COSINE)
    with pytest.raises(CheckpointMismatchError) as refusal:
        resume_schedule(state, **COSINE | flags)
    for part in [*said, "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"]:
        assert part in str(refusal.value)
    resume_schedule(state, **COSINE | flags, override_opt_param_scheduler=True)


def test_override_uses_the_new_schedule_from_the_resumed_step_and_use_checkpoint_keeps_the_old_one():
    state = saved_at(50, **COSINE)
    undisturbed, longer = (saved_rate(50, **COSINE | dict(train_iters=iters)) for iters in (100, 200))
    assert undisturbed != longer
    flags = COSINE | dict(train_iters=200)
    assert resume_schedule(state, **flags, override_opt_param_scheduler=True)[1].param_groups[0]["lr"] == longer
    kept, optimizer = resume_schedule(state, **flags, use_checkpoint_opt_param_scheduler=True)
    kept.step(0)
    assert optimizer.param_groups[0]["lr"] == undisturbed


def saved_rate(step, **flags):
    args = Namespace(**flags, override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False)
    schedule, optimizer, _ = scheduler(args)
    schedule.step(step * flags["global_batch_size"])
    return optimizer.param_groups[0]["lr"]


def test_the_checkpoints_schedule_with_another_weight_decay_is_refused():
    """Megatron would use the flags' weight decay in the first step, and the checkpoint's in later ones."""
    changed = dict(weight_decay=0.0, start_weight_decay=0.0, end_weight_decay=0.0)
    with pytest.raises(CheckpointMismatchError, match=r"--weight-decay was 0.1, not 0.0; give the same"):
        resume_schedule(saved_at(50, **COSINE), **COSINE | changed, use_checkpoint_opt_param_scheduler=True)


@pytest.mark.parametrize(
    ("before", "step", "changes"),
    [
        (CONSTANT, 50, dict(train_iters=200)),
        (CONSTANT, 5, dict(train_iters=200)),
        (CONSTANT, 50, dict(lr_warmup_iters=20)),
        (CONSTANT | dict(lr_warmup_iters=0, lr_warmup_fraction=0.1), 50, dict(train_iters=200)),
        (COSINE | dict(lr_decay_iters=80), 50, dict(train_iters=200)),
    ],
)
def test_a_longer_run_whose_learning_rates_do_not_depend_on_its_length_resumes_exactly(before, step, changes):
    resumed, optimizer = resume_schedule(saved_at(step, **before), **before | changes)
    for later in range(step, 100):
        assert optimizer.param_groups[0]["lr"] == saved_rate(later, **before), later
        resumed.step(before["global_batch_size"])


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (5, dict(lr_warmup_iters=20)),
        (50, dict(lr_warmup_iters=60)),
        (50, dict(global_batch_size=16)),
        (50, dict(lr_decay_style="cosine")),
    ],
)
def test_a_constant_rate_with_another_warm_up_or_batch_size_is_refused(step, changes):
    with pytest.raises(CheckpointMismatchError, match="another schedule"):
        resume_schedule(saved_at(step, **CONSTANT), **CONSTANT | changes)


def test_fewer_steps_than_the_checkpoint_has_made_are_refused(trained):
    with pytest.raises(CheckpointMismatchError, match="has made 2 steps already, and --train-iters is 1; give more"):
        check(trained["plain"], train_iters=1)


def test_a_damaged_checkpoint_is_refused_as_damaged(trained, tmp_path):
    damaged = shutil.copytree(trained["plain"], tmp_path / "damaged")
    (damaged / "iter_0000002" / ".metadata").write_bytes(b"cut off")
    with pytest.raises(CheckpointMismatchError, match=r"cannot be continued: .*\.metadata cannot be read"):
        check(damaged)


@pytest.mark.parametrize(("now", "left"), [("cpu", False), ("cuda", True)])
def test_random_states_of_another_kind_of_device_are_not_loaded_and_this_is_printed(trained, capsys, now, left):
    """`trained` was saved on the CPU: its generators' states have 5,056 bytes, and CUDA's have 16."""
    args = arguments(trained["plain"], no_load_rng=False, program={"device": now})
    leave_other_random_state(args, resumed_state(args))
    assert args.no_load_rng == left
    assert ("was saved on cpu and this run is on cuda" in capsys.readouterr().out) == left
