# SPDX-License-Identifier: Apache-2.0
"""The end of a run that was asked to end: what was saved, and the command that resumes it."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_smar.checkpoint.start_point import StartPoint, apply_start
from megatron_smar.runtime.signals import StopSignals
from megatron_smar.training.providers import close_loaders


def end_after_a_signal(args: Namespace) -> None:
    """Ends a run that was asked to end: data workers, process groups, and the line that says how to resume.

    Returns if nobody asked, for Megatron's other exits.
    """
    handler = StopSignals.current
    if handler is None or not handler.stopped:
        return
    close_loaders()
    if args.rank == 0:
        print(f"{Path(sys.argv[0]).name}: {describe_stop(args)}", flush=True)
    sys.exit(128 + (handler.received or handler.sig))  # not 0: `stage1 && stage2` would go on with half of stage 1


def describe_stop(args: Namespace) -> str:
    """What was saved of a run that was asked to end, and how to resume it, in one line."""
    step = args.curr_iteration + 1
    if not args.save:
        return f"stopped after step {step}; nothing was saved, since there is no --save"
    return f"stopped after step {step} and saved to {args.save}; resume with: {resume_command(args.save)}"


def resume_command(save: str, command: Sequence[str] | None = None) -> str:
    """The command that this process was started by, with what it needs to begin at the checkpoint in `save`.

    Args:
        save: The folder of --save.
        command: The command; None for this process's, torchrun included.
    """
    parts = _own_command() if command is None else command
    if "--config" in parts:  # a file's start is not on the command line; the same command resumes from --save
        return shlex.join(parts)
    return shlex.join(apply_start(parts, StartPoint(save, False, {}, resumes_from_save=True)))


def _own_command() -> list[str]:
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and parent.is_file():
        words = parent.read_bytes().decode(errors="replace").split("\0")[:-1]
        if any(word.endswith(("torchrun", "torch.distributed.run")) for word in words):
            return words
    return [sys.executable, *sys.orig_argv[1:]]
