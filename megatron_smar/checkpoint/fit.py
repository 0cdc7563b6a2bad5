# SPDX-License-Identifier: Apache-2.0
"""Whether a torch_dist checkpoint holds what is to be loaded of it, told before anything is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training import print_rank_0
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename, read_metadata

from megatron_smar.checkpoint.metadata import (
    DamagedError,
    check_objects,
    read_common_state,
    read_contents,
    saved_arguments,
)


class CheckpointMismatchError(ValueError):
    """The checkpoint holds something else; the message names the first weight, or the flag, that differs."""


def check_fit(model: MegatronModule, directory: str | None, step: int | None = None) -> None:
    """Compares the shapes of this rank's part of the model with those in the checkpoint; every rank learns the outcome.

    Args:
        model: One pipeline stage.
        directory: The folder given as --load; None, or one without a checkpoint, is nothing to compare with.
        step: Which of its checkpoints; None for the latest.

    Raises:
        CheckpointMismatchError: On every rank, if any rank found a weight missing or of another shape.
    """
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, _first_mismatch(model, _folder(directory, step)))
    problem = next(filter(None, found), None)
    if problem:
        raise CheckpointMismatchError(
            f"--load {directory} holds another model than the flags describe: {problem}; give the flags that the "
            "checkpoint was trained with, or --use-checkpoint-args."
        )


def _folder(directory: str | None, step: int | None) -> Path | None:
    """The torch_dist checkpoint that Megatron is to load; None without one, or in a format that it checks itself."""
    if directory is None or not Path(get_checkpoint_tracker_filename(directory)).is_file():
        return None
    iteration, release = read_metadata(get_checkpoint_tracker_filename(directory))
    if step:
        iteration, release = step, False
    folder = Path(get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    return folder if (folder / ".metadata").is_file() else None


def _first_mismatch(model: MegatronModule, folder: Path | None) -> str:
    if folder is None:
        return ""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        check_objects(folder, read_contents(folder), rank, size)
    except DamagedError as error:
        return str(error)
    stored = load_tensors_metadata(str(folder))
    for tensor in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
        if not isinstance(tensor, ShardedTensor):
            continue
        if tensor.key not in stored:
            return f"{tensor.key} is not in it"
        ours, theirs = tuple(tensor.global_shape), tuple(stored[tensor.key].global_shape)
        if ours != theirs and not tensor.allow_shape_mismatch:
            return f"{tensor.key} is {list(theirs)} there and {list(ours)} here"
    return ""


def leave_other_random_state(args: Namespace, state: dict[str, Any] | None) -> None:
    """Sets --no-load-rng, and says so, where the checkpoint's generators are those of another kind of device.

    A generator of CUDA has a state of 16 bytes, one of the CPU has 5,056: neither loads the other's.

    Args:
        args: The run's; `no_load_rng` may be set.
        state: Of `resumed_state`.
    """
    if args.no_load_rng or state is None:
        return
    saved, now = getattr(saved_arguments(state), "program", {}).get("device"), args.program["device"]
    if saved and saved != now:
        args.no_load_rng = True
        print_rank_0(
            f"--load {args.load} was saved on {saved} and this run is on {now}: the random generators' states are "
            "not loaded (--no-load-rng), so dropout, if there is any, draws other numbers than an undisturbed run."
        )


def resumed_state(args: Namespace) -> dict[str, Any] | None:
    """What a run stored beside the weights in the checkpoint that this one resumes from; None if it resumes from none.

    Raises:
        CheckpointMismatchError: It cannot be read.
    """
    folder = _folder(args.load, args.ckpt_step)
    if folder is None or folder.name == "release" or args.finetune or args.skip_train:
        return None
    try:
        return read_common_state(folder, read_contents(folder))
    except DamagedError as error:
        raise CheckpointMismatchError(f"--load {args.load} cannot be continued: {error}") from error
