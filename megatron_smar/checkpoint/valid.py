# SPDX-License-Identifier: Apache-2.0
"""Verifies the checkpoint that is about to be loaded, and takes an earlier one where a run can resume from it."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import torch
from megatron.training import print_rank_0

from megatron_smar.checkpoint.fit import checkpoint_to_load
from megatron_smar.checkpoint.location import LOADER_STATES, earlier_steps, problem_of, resumes_own_run, step_of
from megatron_smar.checkpoint.metadata import DamagedError
from megatron_smar.reliability.agreement import problems_of_all
from megatron_smar.reliability.manifest import Manifest, Places, Verification


def verify_content(checkpoint: Path, how: Verification, loader: Path | None) -> tuple[list[str], str]:
    """Compares a checkpoint's files with its manifest; the ranks divide the work.

    Args:
        checkpoint: The checkpoint's folder.
        how: How much is read.
        loader: Folder of the data loader's state; None if it is not needed.

    Returns:
        What is wrong, the same on all ranks; and, if nothing is, a sentence that says what was verified.
    """
    begin, places = time.monotonic(), Places(checkpoint, loader)
    ranked = torch.distributed.is_initialized()
    share, shares = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranked else (0, 1)
    manifest, found = None, list[str]()
    try:
        manifest = Manifest.read(checkpoint)
        if manifest is not None and share == 0:
            found += manifest.size_problems(places)
        if manifest is not None and not found:
            found += manifest.block_problems(places, how, share, shares)
    except (OSError, ValueError) as error:
        found = [str(error)]
    problems: list[str] = []
    for sentences in problems_of_all("\n".join(found)):
        problems += [sentence for sentence in sentences.splitlines() if sentence not in problems]
    if manifest is None:
        return problems, f"{checkpoint} has no manifest, so only the sizes of its files were verified"
    seconds = time.monotonic() - begin
    done = f"{manifest.size / 1e9:.3g} GB verified in {seconds:.1f} s (verification: {how})"
    return problems, f"{checkpoint} is undamaged: {done}"


def take_valid_checkpoint(args: Namespace, how: Verification) -> None:
    """Verifies the checkpoint in --load; a run that resumes takes the newest one that is undamaged.

    Args:
        args: The run's arguments; sets `ckpt_step` to the step that was taken, if it is an earlier one.
        how: How much of the files is read.

    Raises:
        DamagedError: The checkpoint is damaged, and there is no other to take; raised on all ranks.
    """
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None or how == "none":
        return
    rejected: list[str] = []
    while True:
        loader = _loader_states(args, checkpoint)
        problems, outcome = verify_content(checkpoint, how, loader)
        if not problems:
            print_rank_0(outcome)
            return
        rejected.append(f"{checkpoint} is damaged: {'; '.join(problems)}")
        other = _one_before(args, checkpoint)
        if other is None:
            fix = "give another --load" if not resumes_own_run(args) else "no earlier checkpoint there is undamaged"
            raise DamagedError(f"{'. '.join(rejected)}; {fix}.")
        print_rank_0(f"WARNING: {rejected[-1]}. The run resumes from {other.name} instead.")
        args.ckpt_step, checkpoint = step_of(other), other


def _one_before(args: Namespace, checkpoint: Path) -> Path | None:
    """Returns the newest complete checkpoint before one, for a run that resumes from its own checkpoints."""
    if not resumes_own_run(args):
        return None
    earlier = earlier_steps(checkpoint.parent, step_of(checkpoint))
    return next((part for part in earlier if problem_of(part) is None), None)


def _loader_states(args: Namespace, checkpoint: Path) -> Path | None:
    """Returns the folder of the data loader's states that this run will restore."""
    if not resumes_own_run(args) or not args.load_dataloader_state:
        return None
    folders = [Path(args.load) / LOADER_STATES, *map(Path, filter(None, [args.loader_state_folder]))]
    return next((f / checkpoint.name for f in folders if (f / checkpoint.name).is_dir()), folders[0] / checkpoint.name)
