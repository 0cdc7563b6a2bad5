# SPDX-License-Identifier: Apache-2.0
"""Hooks around Megatron's saving and loading of checkpoints, which Megatron has no interface for.

`HOOKS` is empty until `reliability.saving` and `checkpoint.valid` fill it; Megatron then works unchanged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_smar.runtime.adaptation import Where, adaptation


@dataclass
class Hooks:
    """What the trainer does around Megatron's saves and loads.

    Attributes:
        save: Called instead of Megatron's `save_checkpoint`, with it and its arguments.
        finish_asynchronous: Called on all ranks when they have written an asynchronous save, with its step.
        fail_asynchronous: Called on all ranks when one could not, with Megatron's exception.
        load: Called before Megatron loads a checkpoint.
        train: Called before the first step, with the model's chunks and the optimizer.
        open: Opens a file of weights for writing.
        report: What Megatron tells W&B of a save, to be called when the checkpoint has its final name.
        folder: While a checkpoint is saved, the folder in which Megatron is to write it.
        step: The step that is saved.
        errors: What failed on this rank, where Megatron expects that nothing can fail on one rank alone.
    """

    save: Callable[..., None] | None = None
    finish_asynchronous: Callable[[int], object] | None = None
    fail_asynchronous: Callable[[BaseException], None] | None = None
    load: Callable[[], None] | None = None
    train: Callable[[list[Any], Any], None] | None = None
    open: Callable[[str], IO[bytes]] | None = None
    report: Callable[[], None] | None = None
    folder: Path | None = None
    step: int = 0
    errors: list[str] = field(default_factory=list)


HOOKS = Hooks()


@adaptation(
    "a save that fails leaves a folder that looks like a checkpoint, replaces a good one of the same step, or ends one "
    "rank only",
    Where.ANYWHERE,
)
def save_through_hooks() -> None:
    """Makes saves go through `HOOKS.save`, into `HOOKS.folder`, without touching the tracker file."""
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training

    save, name = training.save_checkpoint, checkpointing.get_checkpoint_name
    tracker, wandb = checkpointing.get_checkpoint_tracker_filename, checkpointing.wandb_utils
    report = wandb.on_save_checkpoint_success

    @functools.wraps(save)
    def hooked_save(*args: Any, **kwargs: Any) -> None:
        (HOOKS.save or (lambda original, *rest, **options: original(*rest, **options)))(save, *args, **kwargs)

    @functools.wraps(name)
    def staged_name(path: str, *args: Any, **kwargs: Any) -> str:
        return name(path, *args, **kwargs) if HOOKS.folder is None else str(HOOKS.folder)

    @functools.wraps(tracker)
    def staged_tracker(path: str) -> str:
        return str(tracker(path)) if HOOKS.folder is None else os.devnull

    @functools.wraps(report)
    def report_later(path: str, tracker_file: str, folder: str, iteration: int) -> None:
        if HOOKS.save is None:
            report(path, tracker_file, folder, iteration)
            return
        final = name(folder, iteration, return_base_dir=True)
        HOOKS.report = functools.partial(report, final, tracker(folder), folder, iteration)

    wandb.on_save_checkpoint_success = report_later
    training.save_checkpoint = hooked_save
    checkpointing.get_checkpoint_name = staged_name
    checkpointing.get_checkpoint_tracker_filename = staged_tracker


@adaptation(
    "an asynchronous save that fails ends the run, from the middle of its training loop",
    Where.ANYWHERE,
)
def finish_asynchronous_saves_through_hooks() -> None:
    """Makes asynchronous saves end in `HOOKS.finish_asynchronous`, or `fail_asynchronous`, on all ranks."""
    import megatron.training.async_utils as async_utils
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training

    schedule, finalize = checkpointing.schedule_async_save, async_utils.maybe_finalize_async_save

    @functools.wraps(schedule)
    def schedule_with_end(request: Any) -> None:
        if HOOKS.finish_asynchronous is not None:
            request.add_finalize_fn(functools.partial(HOOKS.finish_asynchronous, HOOKS.step))
        schedule(request)

    @functools.wraps(finalize)
    def finalize_or_report(blocking: bool = False, terminate: bool = False) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            finalize(blocking, terminate)
        except CheckpointException as error:
            if HOOKS.fail_asynchronous is None:
                raise
            HOOKS.fail_asynchronous(error)

    checkpointing.schedule_async_save = schedule_with_end
    async_utils.maybe_finalize_async_save = training.maybe_finalize_async_save = finalize_or_report


@adaptation(
    "what rank 0 alone writes after the weights can fail on rank 0 alone, while the others wait in a collective",
    Where.ANYWHERE,
)
def fail_on_all_ranks_together() -> None:
    """Notes errors of rank 0's files in `HOOKS.errors`, which all ranks compare after the save."""
    import megatron.core.dist_checkpointing.serialization as serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def noting(operation: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(operation)
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                operation(*args, **kwargs)
            except OSError as error:
                if HOOKS.save is None:
                    raise
                HOOKS.errors.append(f"{Path(error.filename or '').name or 'a file'}: {error.strerror or error}")

        return attempt

    FileSystemWriterAsync.finish = noting(FileSystemWriterAsync.finish)
    serialization.save_config = noting(serialization.save_config)


@adaptation("Megatron's manifest of a checkpoint is made by rank 0, which reads all files again", Where.ANYWHERE)
def hash_while_writing() -> None:
    """Opens the files of weights with `HOOKS.open`, in the process that writes them."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    def open_for_writing(path: str, mode: str) -> IO[bytes]:
        return open(path, mode) if HOOKS.open is None or mode != "wb" else HOOKS.open(path)

    filesystem.open = open_for_writing


@adaptation("Megatron loads the checkpoint that the tracker names, whatever its files hold", Where.ANYWHERE)
def load_and_train_through_hooks() -> None:
    """Calls `HOOKS.load` before a checkpoint is loaded, and `HOOKS.train` before the first step."""
    import megatron.training.training as training

    load, train = training.load_checkpoint, training.train

    @functools.wraps(load)
    def hooked_load(*args: Any, **kwargs: Any) -> Any:
        if HOOKS.load is not None:
            HOOKS.load()
        return load(*args, **kwargs)

    @functools.wraps(train)
    def hooked_train(forward: Any, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if HOOKS.train is not None:
            HOOKS.train(model, optimizer)
        return train(forward, model, optimizer, *args, **kwargs)

    training.load_checkpoint, training.train = hooked_load, hooked_train


ADAPTATIONS = (
    save_through_hooks,
    finish_asynchronous_saves_through_hooks,
    fail_on_all_ranks_together,
    hash_while_writing,
    load_and_train_through_hooks,
)
