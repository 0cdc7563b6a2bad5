# SPDX-License-Identifier: Apache-2.0
"""Saves that leave a complete checkpoint or none, and that a run survives if they fail.

Megatron writes into a folder in `.saving`. When all ranks have written, rank 0 adds the manifest, renames the folder
and only then writes the tracker file. Until then the previous checkpoint is untouched, whatever ends the run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.training import get_args, print_rank_0
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smar.reliability.agreement import first_problem, is_first_rank
from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.reliability.manifest import HashingFile, Places, collect
from megatron_smar.reliability.retention import delete_old
from megatron_smar.runtime.saving import HOOKS
from megatron_smar.runtime.signals import StopSignals

STAGING = ".saving"
PAUSE = 5.0  # seconds before the last save of a run is tried again

# Writes a rank's part of the data loader's state of a step into a folder.
SaveLoaderState = Callable[[Any, int, Path], None]


class SaveFailedError(RuntimeError):
    """Too many saves in a row have failed; raised on all ranks."""


class CheckpointSaver:
    """Saves the checkpoints of a run.

    Args:
        config: The config of the reliability flags.
        folder: Folder of the checkpoints (--save).
        loader_folder: Folder of the data loader's states.
        save_loader_state: Writes the data loader's state.
    """

    def __init__(
        self, config: ReliabilityConfig, folder: Path, loader_folder: Path, save_loader_state: SaveLoaderState
    ) -> None:
        self.config, self.folder, self.loader_folder = config, folder, loader_folder
        self._save_loader_state = save_loader_state
        self.failures = 0  # in a row

    def install(self) -> None:
        """Makes Megatron's saves go through this saver."""
        HOOKS.save = self.save
        HOOKS.finish_asynchronous, HOOKS.fail_asynchronous = self._finish, self._fail_asynchronous
        HOOKS.open = lambda path: HashingFile(path, HOOKS.errors)  # type: ignore[assignment,return-value]

    def save(self, megatrons: Callable[..., None], iteration: int, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint; called with Megatron's `save_checkpoint` and its arguments.

        Raises:
            SaveFailedError: This was one of too many saves in a row that failed.
        """
        begin = time.monotonic()
        if get_args().async_save:
            _finish_the_one_before()
        with _protected():
            while not self._attempt(megatrons, iteration, *args, **kwargs):
                if not _is_last(iteration):
                    return
                time.sleep(PAUSE)
        what = "is staged and written while training continues" if get_args().async_save else "is saved"
        print_rank_0(
            f"step {iteration} {what} ({self.folder}); training stopped {time.monotonic() - begin:.3f} s for it"
        )

    def _attempt(self, megatrons: Callable[..., None], iteration: int, *args: Any, **kwargs: Any) -> bool:
        HOOKS.errors.clear()
        problem = first_problem(self._prepare(iteration))
        problem = problem or first_problem(self._write_loader_state(iteration, kwargs.get("train_data_iterator")))
        if problem:
            return self._failed(iteration, problem)
        error = self._write(megatrons, iteration, *args, **kwargs)
        if error is not None:
            return self._failed(iteration, first_problem("; ".join(HOOKS.errors)) or _text(error))
        return True if get_args().async_save else self._finish(iteration)

    def _write(
        self, megatrons: Callable[..., None], iteration: int, *args: Any, **kwargs: Any
    ) -> CheckpointException | None:
        """Makes Megatron write into the prepared folder; returns the error that it raises on all ranks."""
        HOOKS.folder, HOOKS.step = self._staged(iteration), iteration
        try:
            megatrons(iteration, *args, **kwargs)
        except CheckpointException as error:
            return error
        finally:
            HOOKS.folder = None
        return None

    def _staged(self, iteration: int) -> Path:
        return self.folder / STAGING / _name(iteration)

    def _staged_loader(self, iteration: int) -> Path:
        return self.loader_folder / STAGING / _name(iteration)

    def _prepare(self, iteration: int) -> str:
        """Makes empty folders to write into, on rank 0; returns what is wrong."""
        if not is_first_rank():
            return ""
        try:
            self.clear()
            for folder in (self._staged(iteration), self._staged_loader(iteration)):
                folder.mkdir(parents=True)
        except OSError as error:
            return _said(error)
        return ""

    def _write_loader_state(self, iteration: int, iterator: Any) -> str:
        try:
            self._save_loader_state(iterator, iteration, self._staged_loader(iteration))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            return _said(error)
        return ""

    def _finish(self, iteration: int) -> bool:
        """Makes what all ranks have written a checkpoint; on all ranks."""
        problem = first_problem("; ".join(HOOKS.errors)) or first_problem(self._commit(iteration))
        if problem:
            return self._failed(iteration, problem)
        self.failures = 0
        if HOOKS.report is not None:
            HOOKS.report()
        HOOKS.report = None
        if get_args().async_save:
            print_rank_0(f"step {iteration} is saved ({self.folder})")
        if self.config.keep_last is not None and is_first_rank():
            self._delete_old(iteration)
        return True

    def _delete_old(self, iteration: int) -> None:
        try:
            for deleted in delete_old(self.folder, self.loader_folder, iteration, self.config):
                print(f"deleted {deleted} (--keep-last {self.config.keep_last})", flush=True)
        except OSError as error:
            print(f"WARNING: an old checkpoint in {self.folder} is not deleted: {_said(error)}", flush=True)

    def _commit(self, iteration: int) -> str:
        """Adds the manifest and renames the folders, on rank 0; returns what is wrong."""
        if not is_first_rank():
            return ""
        staged, loader = self._staged(iteration), self._staged_loader(iteration)
        try:
            collect(Places(staged, loader)).write(staged)
            if any(loader.iterdir()):
                _replace(self.loader_folder / loader.name, loader)
            _replace(self.folder / staged.name, staged)
            write_tracker(self.folder, iteration)
        except (OSError, ValueError) as error:  # a damaged file of hashes too: the others wait for this rank
            return _said(error)
        self.clear()
        return ""

    def _failed(self, iteration: int, problem: str) -> bool:
        """Removes the half that was written and reports the failure; on all ranks.

        Raises:
            SaveFailedError: Too many saves in a row have failed.
        """
        self.failures += 1
        if is_first_rank():
            self.clear()
        what = f"step {iteration} was not saved in {self.folder}: {problem}; the half that was written is removed"
        most = self.config.max_failed_saves
        if self.failures >= most or (_is_last(iteration) and get_args().async_save):
            raise SaveFailedError(
                f"{what}. It was failed save {self.failures} in a row (--max-failed-saves {most}): make room, or give "
                f"another --save. {self._newest()}"
            )
        again = f"tries again in {PAUSE:g} s" if _is_last(iteration) else "continues and tries again at the next save"
        print_rank_0(f"WARNING: {what}; the run {again} ({self.failures} of --max-failed-saves {most})")
        return False

    def _fail_asynchronous(self, error: BaseException) -> None:
        self._failed(HOOKS.step, first_problem("; ".join(HOOKS.errors)) or _text(error))

    def _newest(self) -> str:
        tracker = Path(get_checkpoint_tracker_filename(str(self.folder)))
        return f"The newest checkpoint is that of step {tracker.read_text().strip()}." if tracker.is_file() else ""

    def clear(self) -> None:
        """Removes what saves that did not end have left; one save is in progress at a time."""
        for folder in (self.folder, self.loader_folder):
            shutil.rmtree(folder / STAGING, ignore_errors=True)


def write_tracker(folder: Path, iteration: int) -> None:
    """Makes a step the one that a folder of checkpoints resumes from; the file is replaced in one operation."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    partial = tracker.with_name(f".{tracker.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, tracker)
    _synchronize(folder)


def _replace(final: Path, staged: Path) -> None:
    """Renames a complete folder to its final name; what had that name is deleted after it."""
    old = staged.with_name(f"{staged.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(staged, final)
    _synchronize(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _synchronize(folder: Path) -> None:
    """Writes a folder's entries to the disk, so that a rename survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _protected() -> Iterator[None]:
    """Lets neither a second signal nor the death of a data worker end the run in the middle of a save."""
    handler, stop = signal.getsignal(signal.SIGCHLD), StopSignals.current
    if stop is not None:
        stop.saving = True
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises; the next read notices the death as well
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
        if stop is not None:
            stop.saving = False


def _finish_the_one_before() -> None:
    from megatron.training.training import maybe_finalize_async_save

    maybe_finalize_async_save(blocking=True)


def _is_last(iteration: int) -> bool:
    """Returns whether the run ends after this save."""
    stopped = StopSignals.current is not None and StopSignals.current.stopped
    return stopped or iteration == get_args().train_iters


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        place = f"{Path(error.filename).name}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return str(error).strip().splitlines()[0]


def _text(error: BaseException) -> str:
    failures = getattr(error, "failures", {})
    inner = next((failure for failure, _ in failures.values()), error)
    return str(inner).strip().splitlines()[0]
