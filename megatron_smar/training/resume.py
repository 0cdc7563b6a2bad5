# SPDX-License-Identifier: Apache-2.0
"""The data loaders' state: saved by Megatron with each checkpoint, found and restored here."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_name

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.loader import EnergonIterator
from megatron_smar.data.state import load_rank_state
from megatron_smar.reliability.step_samples import WatchedSamples
from megatron_smar.runtime.signals import StopSignals


def dataloader_state_folder(checkpoint: str) -> str:
    """Returns the folder of the loader's states: not in the iterations' folders, which must be empty for Megatron."""
    return os.path.join(checkpoint, "dataloader")


def take_over_folder(args: Namespace) -> None:
    """Sets the loader states' folder (`loader_state_folder`), and whether Megatron saves them (`dataloader_save`)."""
    args.loader_state_folder = args.dataloader_save or (dataloader_state_folder(args.save) if args.save else None)
    args.dataloader_save = None if args.virtual_pipeline_model_parallel_size else args.loader_state_folder


def restore(iterator: EnergonIterator, data_parallel_rank: int, data_parallel_size: int) -> None:
    """Restores the loader to the position in the data of the loaded checkpoint.

    Args:
        iterator: The training loader's iterator.
        data_parallel_rank: This rank's index among those that read different samples.
        data_parallel_size: Number of ranks that read different samples.

    Raises:
        DataError: The state cannot be read, or does not fit this run.
    """
    args = get_args()
    if not args.iteration or not args.load_dataloader_state:
        return
    # Look next to the checkpoint first, then in --dataloader-save.
    folders = [folder for folder in (dataloader_state_folder(args.load), args.loader_state_folder) if folder]
    folder = next((folder for folder in folders if _state_file(folder, args.iteration, 0).exists()), folders[0])
    state = load_rank_state(
        lambda rank: _state_file(folder, args.iteration, rank),
        data_parallel_rank,
        data_parallel_size,
        args.num_workers,
        get_num_microbatches(),
    )
    iterator.restore_state(state)


def _state_file(folder: str, iteration: int, rank: int) -> Path:
    """Returns the file with the state of one data-parallel rank, under the name that Megatron gives it."""
    files = [
        Path(
            get_checkpoint_name(
                folder,
                iteration,
                pipeline_parallel=pipeline,
                tensor_rank=0,
                pipeline_rank=0,
                expert_parallel=False,
                expert_rank=0,
                basename=f"train_dataloader_dprank{rank:03d}.pt",
            )
        )
        for pipeline in (get_args().pipeline_model_parallel_size > 1, get_args().pipeline_model_parallel_size == 1)
    ]
    # Runs with and without pipeline parallelism name their folders differently; the newest file is the checkpoint's.
    return max((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, default=files[0])


class SavedPositions:
    """Saves the loader's state instead of Megatron, for virtual pipeline stages.

    Megatron 0.19.2 saves the state of one iterator, and fails on the list of all virtual stages' iterators. All virtual
    stages read the same samples, so the first chunk's state is sufficient. Nothing is read between two steps: the state
    after a step's last micro-batch belongs to a checkpoint after that step, and is written before that checkpoint.

    Args:
        iterator: The training loader's iterator.
        data_parallel_rank: This rank's index among those that read different samples.
        folder: Folder of the states, which have Megatron's file names.
    """

    def __init__(self, iterator: WatchedSamples, data_parallel_rank: int, folder: str) -> None:
        self.iterator = iterator
        self._rank, self._folder = data_parallel_rank, folder
        self._left = 0
        self._written: int | None = None
        if StopSignals.current is not None:
            StopSignals.current.before_saving(lambda: self._save(get_args().curr_iteration + 1))

    def __iter__(self) -> SavedPositions:
        return self

    def __next__(self) -> VisionLanguageBatch:
        """Returns the next micro-batch; after the last micro-batch of a step, saves the state."""
        self._left = self._left or get_num_microbatches()
        batch = next(self.iterator)
        self._left -= 1
        if not self._left:
            self._forget_unused()
            if _may_be_saved(get_args().curr_iteration + 1):
                self._save(get_args().curr_iteration + 1)
        return batch

    def save_state(self) -> dict[str, Any]:
        """Returns the loader's state."""
        state: dict[str, Any] = self.iterator.save_state()
        return state

    def _forget_unused(self) -> None:
        """Deletes the last saved state if no checkpoint was saved with it."""
        if self._written is not None and not os.path.isdir(get_checkpoint_name(get_args().save, self._written, True)):
            _state_file(self._folder, self._written, self._rank).unlink(missing_ok=True)
        self._written = None

    def _save(self, step: int) -> None:
        file = _state_file(self._folder, step, self._rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save({"dataloader_state_dict": self.save_state()}, partial)
        partial.replace(file)
        self._written = step


def _may_be_saved(step: int) -> bool:
    """Whether Megatron's loop may save a checkpoint after a step, apart from a signal to end."""
    args = get_args()
    if args.exit_duration_in_mins or args.non_persistent_save_interval:
        return True
    intervals = (args.save_interval, args.exit_interval)
    return step == args.train_iters or any(step % interval == 0 for interval in intervals if interval)
