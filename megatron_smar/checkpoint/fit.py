# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run takes up, and whether it can take up what is in it beside the weights."""

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
    """The checkpoint holds something else; the message names the first weight, or the flag, that differs."""


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The torch_dist checkpoint that Megatron is to load for these arguments; None without one."""
    folder = _folder(args.load, args.ckpt_step)
    return folder if folder is not None else _folder(args.pretrained_checkpoint, None)


def _folder(directory: str | None, step: int | None) -> Path | None:
    """The torch_dist checkpoint that Megatron is to load; None without one."""
    if directory is None or not Path(get_checkpoint_tracker_filename(directory)).is_file():
        return None
    iteration, release = read_metadata(get_checkpoint_tracker_filename(directory))
    if step:
        iteration, release = step, False
    folder = Path(get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    return folder if (folder / ".metadata").is_file() else None


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
