# SPDX-License-Identifier: Apache-2.0
"""The data loaders' state: saved by Megatron with each checkpoint, found and restored here."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_name

from megatron_smar.checkpoint.location import LOADER_STATES
from megatron_smar.data.loader import EnergonIterator
from megatron_smar.data.state import load_rank_state


def dataloader_state_folder(checkpoint: str) -> str:
    """Returns the folder of the loader's states: not in the iterations' folders, which must be empty for Megatron."""
    return os.path.join(checkpoint, LOADER_STATES)


def take_over_folder(args: Namespace) -> None:
    """Sets the loader states' folder (`loader_state_folder`); `save_state` saves them instead of Megatron.

    Megatron 0.19.2 writes the states in place, ends only the ranks that fail at that, and fails on the list of all
    virtual stages' iterators.
    """
    args.loader_state_folder = args.dataloader_save or (dataloader_state_folder(args.save) if args.save else None)
    args.dataloader_save = None


def save_state(iterator: Any, iteration: int, folder: Path) -> None:
    """Saves this rank's position in the data, if the rank is the first of those that read the same samples.

    Args:
        iterator: Megatron's iterator of the training data, or those of all virtual stages, which read the same samples.
        iteration: The checkpoint's step.
        folder: Folder of this step's states; the files have Megatron's names.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    iterator = iterator[0] if isinstance(iterator, list) else iterator
    if iterator is None or groups.pp.rank() or groups.tp.rank() or groups.cp.rank():
        return
    file = folder / _state_file(str(folder), iteration, groups.dp.rank()).relative_to(folder / folder.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dataloader_state_dict": iterator.iterable.save_state()}, file)


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
