# SPDX-License-Identifier: Apache-2.0
"""Checks that the checkpoints a run's flags name have the one format that is read without running code in it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.training.checkpointing import get_checkpoint_tracker_filename

from megatron_smar.checkpoint.metadata import find_checkpoint, read_common_state, read_contents

FORMAT = "torch_dist"


def check_formats(args: Namespace) -> None:
    """Refuses checkpoint formats that are unpickled without a check, or that load under one parallel layout only.

    Args:
        args: The run's arguments.

    Raises:
        ValueError: A flag asks for such a format; the message names the flag and its value.
    """
    uses = bool(args.save or args.load)
    for flag, value in (("--ckpt-format", args.ckpt_format), ("--ckpt-convert-format", args.ckpt_convert_format)):
        if uses and value not in (None, FORMAT):
            raise ValueError(
                f"{flag} {value} is not supported: only {FORMAT} is read without running what a file holds, and under "
                "any layout; leave the flag out."
            )
    if args.async_save and args.async_strategy != "mcore":
        raise ValueError(
            f"--async-strategy {args.async_strategy} is not supported: asynchronous saves are written by a thread of "
            "each rank, from copies; leave it out."
        )
    if args.save_retain_interval is not None:
        raise ValueError(
            f"--save-retain-interval {args.save_retain_interval} deletes checkpoints without a look at the newest: "
            f"give --keep-last 1 --keep-every {args.save_retain_interval}, or --keep-last 2."
        )
    if args.verify_integrity:
        raise ValueError(
            "--verify-integrity reads each checkpoint again on one rank: every checkpoint has a manifest already, and "
            "--verify-checkpoint says how much of it is verified; leave it out."
        )
    if args.non_persistent_ckpt_type is not None:
        raise ValueError(
            f"--non-persistent-ckpt-type {args.non_persistent_ckpt_type} is not supported: a run resumes from what is "
            "in --save only, and local files are unpickled unchecked; leave it out, or make --save-interval shorter."
        )


def check_loadable(args: Namespace) -> None:
    """Reads, safely, the tables of contents and the arguments of all checkpoints that Megatron will load.

    Args:
        args: The run's arguments.

    Raises:
        ValueError: A checkpoint has another format, is damaged, or asks for code to be run.
    """
    check_formats(args)
    for flag, directory, step in _named(args):
        if not Path(get_checkpoint_tracker_filename(directory)).is_file():
            continue  # no checkpoint there
        try:
            folder = find_checkpoint(Path(directory), step)
            read_common_state(folder, read_contents(folder))
        except ValueError as error:
            raise ValueError(f"{flag} {directory} cannot be loaded: {error}") from error


def _named(args: Namespace) -> Iterator[tuple[str, str, int | None]]:
    """Yields each folder of checkpoints: its flag, its path, and the step to load (None for the latest)."""
    if args.load:
        yield "--load", args.load, args.ckpt_step
    if args.pretrained_checkpoint:
        yield "--pretrained-checkpoint", args.pretrained_checkpoint, None
    if args.non_persistent_global_ckpt_dir:
        yield "--non-persistent-global-ckpt-dir", args.non_persistent_global_ckpt_dir, None
    elif args.load:
        yield "--load", os.path.join(args.load, "non_persistent"), None
