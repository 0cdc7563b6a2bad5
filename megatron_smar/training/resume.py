# SPDX-License-Identifier: Apache-2.0
"""Where the data loaders stood: saved by Megatron with each checkpoint, found and restored here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import checkpointing, get_args

from megatron_smar.data.loader import EnergonIterator
from megatron_smar.data.state import load_rank_state


def dataloader_state_folder(checkpoint: str) -> str:
    """Where the loader's state lies: beside the iterations, whose own folders Megatron wants to find empty."""
    return os.path.join(checkpoint, "dataloader")


def restore(iterator: EnergonIterator, data_parallel_rank: int, data_parallel_size: int) -> None:
    """Goes on in the data where the checkpoint that was loaded stood.

    Raises:
        DataError: The state cannot be read, or does not fit this run.
    """
    args = get_args()
    if not args.iteration or not args.load_dataloader_state:
        return
    folder = dataloader_state_folder(args.load)
    if not os.path.isdir(folder) and args.dataloader_save:
        folder = args.dataloader_save  # the run before was told to keep it there
    state = load_rank_state(
        lambda rank: _state_file(folder, args.iteration, rank),
        data_parallel_rank,
        data_parallel_size,
        args.num_workers,
        get_num_microbatches(),
    )
    iterator.restore_state(state)


def _state_file(folder: str, iteration: int, rank: int) -> Path:
    """The state of one data-parallel rank, under the name that Megatron gave it."""
    files = [
        Path(
            checkpointing.get_checkpoint_name(
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
    # Runs with and without pipelines name their folders differently, and what was saved last is what was loaded.
    return max((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, default=files[0])


def install_virtual_stages() -> None:
    """Makes Megatron save the loader's state with virtual pipeline stages.

    Its `maybe_save_dataloader_state` (0.19.2) takes one iterator, and is handed the list of all virtual stages' ones.
    They read the same samples, and between two steps stand at the same place, so that the first speaks for all.
    """
    save = checkpointing.maybe_save_dataloader_state
    if getattr(save, "takes_lists", False):
        return

    def save_first(train_iterator: Any, *args: Any, **kwargs: Any) -> None:
        save(train_iterator[0] if isinstance(train_iterator, list) else train_iterator, *args, **kwargs)

    save_first.takes_lists = True  # type: ignore[attr-defined]
    checkpointing.maybe_save_dataloader_state = save_first
