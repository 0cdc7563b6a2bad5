# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run loads, and what the checkpoint holds besides the weights."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.training import print_rank_0
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename, read_metadata

from megatron_smar.checkpoint.metadata import (
    DamagedError,
    read_common_state,
    read_contents,
    saved_arguments,
)


class CheckpointMismatchError(ValueError):
    """The checkpoint does not fit the run; the message names the first weight, or the flag, that differs."""


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Returns the folder of the torch_dist checkpoint that Megatron will load for these arguments, or None."""
    folder = _folder(args.load, args.ckpt_step)
    return folder if folder is not None else _folder(args.pretrained_checkpoint, None)


def _folder(directory: str | None, step: int | None) -> Path | None:
    """Returns the folder of the torch_dist checkpoint in `directory` that Megatron will load, or None."""
    if directory is None or not Path(get_checkpoint_tracker_filename(directory)).is_file():
        return None
    iteration, release = read_metadata(get_checkpoint_tracker_filename(directory))
    if step:
        iteration, release = step, False
    folder = Path(get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    return folder if (folder / ".metadata").is_file() else None


def leave_other_random_state(args: Namespace, state: dict[str, Any] | None) -> None:
    """Sets --no-load-rng, and prints it, where the checkpoint was saved on another kind of device.

    A CUDA generator's state has 16 bytes and a CPU generator's 5,056; neither can load the other's.

    Args:
        args: The run's arguments; `no_load_rng` may be set.
        state: The result of `resumed_state`.
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


def resumes(args: Namespace, folder: Path) -> bool:
    """Returns whether a run resumes from a checkpoint, rather than starting a new run or evaluating."""
    return not (folder.name == "release" or args.finetune or args.skip_train)


def resumed_state(args: Namespace) -> dict[str, Any] | None:
    """Returns the common state of the checkpoint that this run resumes from; None if it does not resume.

    The common state is everything but the weights: arguments, step, scheduler.

    Raises:
        CheckpointMismatchError: The common state cannot be read.
    """
    folder = _folder(args.load, args.ckpt_step)
    if folder is None or not resumes(args, folder):
        return None
    try:
        return read_common_state(folder, read_contents(folder))
    except DamagedError as error:
        raise CheckpointMismatchError(f"--load {args.load} cannot be continued: {error}") from error
