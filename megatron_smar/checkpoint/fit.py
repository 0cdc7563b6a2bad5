# SPDX-License-Identifier: Apache-2.0
"""Whether a torch_dist checkpoint holds the model that is to load it, told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename, read_metadata


class CheckpointMismatchError(ValueError):
    """The checkpoint holds another model; the message names the first weight that differs."""


def check_fit(model: MegatronModule, directory: str | None) -> None:
    """Compares the shapes of this rank's part of the model with those in the checkpoint; every rank learns the outcome.

    Args:
        model: One pipeline stage.
        directory: The folder given as --load; None, or one without a checkpoint, is nothing to compare with.

    Raises:
        CheckpointMismatchError: On every rank, if any rank found a weight missing or of another shape.
    """
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, _first_mismatch(model, directory))
    problem = next(filter(None, found), None)
    if problem:
        raise CheckpointMismatchError(
            f"--load {directory} holds another model than the flags describe: {problem}; give the flags that the "
            "checkpoint was trained with, or --use-checkpoint-args."
        )


def _first_mismatch(model: MegatronModule, directory: str | None) -> str:
    if directory is None or not Path(get_checkpoint_tracker_filename(directory)).is_file():
        return ""
    iteration, release = read_metadata(get_checkpoint_tracker_filename(directory))
    folder = Path(get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    if not (folder / ".metadata").is_file():
        return ""  # another format than torch_dist, which Megatron checks itself
    groups = ProcessGroupCollection.use_mpu_process_groups()
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
