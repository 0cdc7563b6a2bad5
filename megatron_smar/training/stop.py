# SPDX-License-Identifier: Apache-2.0
"""The end of a run that was stopped by a signal: what was saved, and the command that resumes it."""

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
    """Ends a run that was stopped by a signal: stops the data workers and prints how to resume.

    Returns if there was no signal, for Megatron's other exits.
    """
    handler = StopSignals.current
    if handler is None or not handler.stopped:
        return
    close_loaders()
    if args.rank == 0:
        print(f"{Path(sys.argv[0]).name}: {describe_stop(args)}", flush=True)
    sys.exit(128 + (handler.received or handler.sig))  # 0 would let `stage1 && stage2` start stage 2


def describe_stop(args: Namespace) -> str:
    """Returns one line with what was saved of a run that was stopped, and how to resume it."""
    step = args.curr_iteration + 1
    if not args.save:
        return f"stopped after step {step}; nothing was saved, since there is no --save"
    return f"stopped after step {step} and saved to {args.save}; resume with: {resume_command(args.save)}"


def resume_command(save: str, command: Sequence[str] | None = None) -> str:
    """Returns the command that started this process, changed so that it resumes from the checkpoint in `save`.

    Args:
        save: The folder of --save.
        command: The command; None for this process's command, including torchrun.
    """
    parts = _own_command() if command is None else command
    if "--config" in parts:  # --load is in the file; the same command resumes from --save
        return shlex.join(parts)
    return shlex.join(apply_start(parts, StartPoint(save, False, {}, resumes_from_save=True)))


def _own_command() -> list[str]:
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and parent.is_file():
        words = parent.read_bytes().decode(errors="replace").split("\0")[:-1]
        if any(word.endswith(("torchrun", "torch.distributed.run")) for word in words):
            return words
    return [sys.executable, *sys.orig_argv[1:]]
