# SPDX-License-Identifier: Apache-2.0
"""Checks that a run can resume a checkpoint's optimizer and schedule with its flags; Megatron only asserts it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.location import same_place
from megatron_smar.checkpoint.metadata import saved_arguments
from megatron_smar.model.parts import frozen_parts

# The sizes that a `dp_reshardable` optimizer state depends on; a `fully_reshardable` state loads under any of them.
MODEL_PARALLEL = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
# Megatron finds a parameter's optimizer state by these, or they decide which tensors the state consists of.
_STATE_ARGUMENTS = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "optimizer", "bf16", "fp16")
_BATCH_ARGUMENTS = ("global_batch_size", "rampup_batch_size", "step_batch_size_schedule")
_SCHEDULE_ARGUMENTS = (
    "train_iters",
    "train_samples",
    *_BATCH_ARGUMENTS,
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_warmup_fraction",
    "lr_warmup_iters",
    "lr_warmup_samples",
)
# Which mean of the losses is minimized.
_LOSS_ARGUMENTS = ("loss_weighting", "calculate_per_token_loss")
_WEIGHT_DECAY_ARGUMENTS = ("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")


def check_continuation(args: Namespace, state: dict[str, Any] | None) -> None:
    """Checks that the optimizer's state and the schedule in a checkpoint can be loaded.

    All ranks read the same files, so all reach the same result.

    Args:
        args: The run's validated arguments; sets `override_opt_param_scheduler` where the schedules differ only in
            settings without an effect.
        state: The result of `fit.resumed_state`.

    Raises:
        CheckpointMismatchError: Megatron could not load them, or would skip a part of them.
    """
    if state is None:
        return
    done = state.get("iteration", 0)
    if args.train_iters and args.train_iters < done:
        raise CheckpointMismatchError(
            f"--load {args.load} has made {done} steps already, and --train-iters is {args.train_iters}; give more"
            f"{_or_a_new_run(args)}."
        )
    if args.no_load_optim:
        return
    check_loss(args, state)
    check_optimizer(args, state)
    check_schedule(args, state)


def check_loss(args: Namespace, state: dict[str, Any]) -> None:
    """Compares the mean that a run minimizes; the optimizer's moments are those of the checkpoint's.

    Args:
        args: The run's arguments.
        state: The result of `fit.resumed_state`.

    Raises:
        CheckpointMismatchError: The run would go on with another loss.
    """
    changed = list(_changed(saved_arguments(state), args, _LOSS_ARGUMENTS))
    if changed:
        raise CheckpointMismatchError(
            f"--load {args.load} minimized another mean of the losses: {', '.join(changed)}; give the same, or "
            f"--no-load-optim to continue with a new optimizer and a schedule from its start{_or_a_new_run(args)}."
        )


def check_optimizer(args: Namespace, state: dict[str, Any]) -> None:
    """Compares the optimizer's state in a checkpoint with the state that this run needs.

    Args:
        args: The run's arguments.
        state: The result of `fit.resumed_state`.

    Raises:
        CheckpointMismatchError: Megatron could not load the state, or would skip a part of it.
    """
    saved = saved_arguments(state)
    sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    remedy = f"or --no-load-optim to continue with a new optimizer and a schedule from its start{_or_a_new_run(args)}"
    if getattr(saved, "no_save_optim", False):
        raise CheckpointMismatchError(
            f"--load {args.load} was saved with --no-save-optim; give --finetune to start from its weights, {remedy}."
        )
    changed = list(_changed(saved, args, _STATE_ARGUMENTS))
    if frozen_parts(saved.freeze) != frozen_parts(args.freeze):
        changed.append(f"--freeze was {_parts(saved)}, not {_parts(args)}")
    if changed:
        raise CheckpointMismatchError(
            f"--load {args.load} has an optimizer's state that does not fit these flags: {', '.join(changed)}; give "
            f"the same, {remedy}."
        )
    if args.use_distributed_optimizer and sharding is None:
        raise CheckpointMismatchError(
            f"--use-distributed-optimizer cannot load the optimizer's state in --load {args.load}, which was saved "
            f"without it; leave the flag out, {remedy}."
        )
    if sharding and not args.use_distributed_optimizer:
        raise CheckpointMismatchError(
            f"--load {args.load} has the distributed optimizer's state; give --use-distributed-optimizer, {remedy}."
        )
    if sharding == "dp_reshardable" and _layout(saved) != _layout(args):
        raise CheckpointMismatchError(
            f"--load {args.load} was saved with --no-dist-ckpt-optim-fully-reshardable under {_layout(saved)}, and its "
            f"optimizer's state does not fit {_layout(args)}; give the same sizes, {remedy}."
        )


def check_schedule(args: Namespace, state: dict[str, Any]) -> None:
    """Compares the schedules of learning rate and weight decay; Megatron loads none in which any number differs.

    Args:
        args: The run's validated arguments; `override_opt_param_scheduler` may be set.
        state: The result of `fit.resumed_state`.

    Raises:
        CheckpointMismatchError: The schedules differ, and no flag says which of the two applies.
    """
    saved, before = saved_arguments(state), state["opt_param_scheduler"]
    decay = list(_changed(saved, args, _WEIGHT_DECAY_ARGUMENTS))
    if decay and args.use_checkpoint_opt_param_scheduler:
        # Megatron 0.19.2 sets the first step's weight decay before it loads the checkpoint's.
        raise CheckpointMismatchError(
            f"--use-checkpoint-opt_param-scheduler keeps the weight decay of --load {args.load}, and {decay[0]}; give "
            "the same."
        )
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    changed = [*_schedule_changes(saved, args, before), *decay]
    if changed:
        raise CheckpointMismatchError(
            f"--load {args.load} cannot be continued under another schedule unasked: {', '.join(changed)}; give the "
            "same, --override-opt_param-scheduler for the one of these flags from here on, or "
            f"--use-checkpoint-opt_param-scheduler for the checkpoint's{_or_a_new_run(args)}."
        )
    # Only lengths without an effect on the schedule can still differ; Megatron would compare those too.
    args.override_opt_param_scheduler = True


def _schedule_changes(saved: Any, args: Namespace, before: dict[str, Any]) -> Iterator[str]:
    """Yields the changed arguments of the learning rate's schedule, if the change has an effect."""
    decay, warmup = _decay_samples(args), _warmup_samples(args)
    batch = list(_changed(saved, args, _BATCH_ARGUMENTS))
    is_constant = before["lr_decay_style"] == args.lr_decay_style == "constant"
    warmup_done = is_constant and before["num_steps"] >= max(before["lr_warmup_steps"], warmup)
    same = (before["lr_decay_style"], before["lr_warmup_steps"]) == (args.lr_decay_style, warmup)
    same = same and (is_constant or before["lr_decay_steps"] == decay)
    if batch or not (warmup_done or same):
        yield from _changed(saved, args, _SCHEDULE_ARGUMENTS)


def _decay_samples(args: Namespace) -> float:
    """Returns `lr_decay_steps` of Megatron's scheduler, which counts samples."""
    if args.train_iters:
        return (args.lr_decay_iters or args.train_iters) * args.global_batch_size
    return args.lr_decay_samples or args.train_samples


def _warmup_samples(args: Namespace) -> float:
    """Returns `lr_warmup_steps` of Megatron's scheduler."""
    if args.lr_warmup_fraction is not None:
        return args.lr_warmup_fraction * _decay_samples(args)
    return args.lr_warmup_iters * args.global_batch_size if args.train_iters else args.lr_warmup_samples


def _changed(saved: Any, args: Namespace, names: tuple[str, ...]) -> Iterator[str]:
    """Yields `--flag was A, not B` for each flag that has changed."""
    for name in names:
        was, now = _value(saved, name), _value(args, name)
        if was != now:
            yield f"--{name.replace('_', '-')} was {was}, not {now}"


def _value(args: Any, name: str) -> Any:
    """Returns an argument's value; None where it has no effect or was not given."""
    value = getattr(args, name, None)
    if name in ("decoupled_lr", "decoupled_min_lr"):  # not given: set to the plain rate, for the modality biases
        return value if value != getattr(args, name.removeprefix("decoupled_")) else None
    if name in ("start_weight_decay", "end_weight_decay"):  # without effect for a constant weight decay
        return value if args.weight_decay_incr_style != "constant" else None
    if name == "weight_decay":
        return value if args.weight_decay_incr_style == "constant" else None
    if name == "lr_decay_iters":  # not given: Megatron sets it to train_iters
        return value or getattr(args, "train_iters", None)
    if name == "lr_decay_samples":
        return value or getattr(args, "train_samples", None)
    if name == "train_iters" and getattr(args, "train_samples", None):
        return None
    return value


def _or_a_new_run(args: Namespace) -> str:
    """Returns advice for a forgotten --finetune: a checkpoint from another folder is usually another stage's."""
    if same_place(args.load, args.save):
        return ""
    return "; or, to start a new run from its weights, give --finetune"


def _parts(args: Any) -> str:
    return " ".join(args.freeze) or "nothing"


def _layout(args: Namespace) -> str:
    """Returns the model-parallel sizes as text, such as `TP 2, EP 4`."""
    sizes = {name: getattr(args, argument, None) or 1 for name, argument in MODEL_PARALLEL.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "no model parallelism"
