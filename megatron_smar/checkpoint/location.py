# SPDX-License-Identifier: Apache-2.0
"""Finds the checkpoint to load in a folder of checkpoints, and those whose saving was interrupted.

Megatron treats a folder without a tracker file as empty and trains from random weights; where the tracker names no
step it exits with status 0. Here a folder that is not empty either has a checkpoint to load or raises an error.
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from megatron_smar.checkpoint.metadata import (
    DamagedError,
    file_problems,
    read_common_state,
    read_contents,
    read_tracker,
)
from megatron_smar.reliability.manifest import Manifest, Places

RELEASE = "release"
LOADER_STATES = "dataloader"  # in a folder of checkpoints: each step's state of the data loaders
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Location:
    """A folder of checkpoints, as --save and --load name it.

    Attributes:
        path: The folder.
        checkpoint: Folder of the checkpoint to load; None if there is none.
        half_written: Names of the checkpoints whose saving was interrupted; they are ignored.
        newer: Names of the checkpoints after the one to load.
        rejected: Sentences on the later checkpoints that are damaged, for which this one is taken instead.
    """

    path: Path
    checkpoint: Path | None
    half_written: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The checkpoint's step; 0 without a checkpoint and for a converted model."""
        return int(_tracker_content(self.checkpoint.name)) if self.checkpoint and not self.is_release else 0

    @property
    def is_release(self) -> bool:
        """Whether the checkpoint is a converted model, not saved by a run."""
        return self.checkpoint is not None and self.checkpoint.name == RELEASE


def locate(flag: str, path: str, step: int | None = None, fall_back: bool = False) -> Location:
    """Finds the checkpoint that a flag names, and checks that it is complete.

    Args:
        flag: The flag that names the folder, for the error messages.
        path: The folder.
        step: Step of the checkpoint; None for the step that the tracker file names.
        fall_back: Whether to take an earlier checkpoint where the one that the tracker names is damaged.

    Returns:
        The location; without a checkpoint if the folder holds none, or only half-written ones.

    Raises:
        ValueError: The path is not a folder of checkpoints, or the checkpoint there cannot be loaded.
    """
    try:
        return _locate(flag, path, step, fall_back)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror or error}); give another folder.") from error


def same_place(first: str | None, second: str | None) -> bool:
    """Returns whether two paths name the same folder, which need not exist; links and trailing slashes are resolved."""
    return bool(first and second) and Path(str(first)).resolve() == Path(str(second)).resolve()


def resumes_own_run(args: Namespace) -> bool:
    """Returns whether a run resumes from the checkpoints that it saves, so that any of them is its own."""
    return same_place(args.load, args.save) and not args.finetune and not args.skip_train


def problem_of(checkpoint: Path) -> str | None:
    """Returns why a checkpoint cannot be loaded, as far as sizes and tables of contents show; None if it can."""
    if not checkpoint.is_dir():
        return f"there is no {checkpoint.name}"
    if not (checkpoint / ".metadata").is_file():
        return f"{checkpoint} has no .metadata: it is half-written"
    try:
        contents = read_contents(checkpoint)
        problem = next(file_problems(checkpoint, contents), None)
        manifest = Manifest.read(checkpoint) if problem is None else None
        if manifest is not None:
            problem = next(manifest.size_problems(Places(checkpoint)), None)
        if problem is None:
            read_common_state(checkpoint, contents)
    except DamagedError as error:
        return str(error).rstrip(".")
    except ValueError as error:
        problem = str(error)
    return problem and f"{checkpoint} is damaged: {problem}"


def earlier_steps(folder: Path, step: int) -> list[Path]:
    """Returns the checkpoints before a step, the newest first."""
    iterations = [part for part in folder.iterdir() if _ITERATION.fullmatch(part.name)]
    earlier = [part for part in iterations if step_of(part) < step and not _is_foreign(part)]
    return sorted(earlier, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint, by its folder's name."""
    return int(checkpoint.name.removeprefix("iter_"))


def _locate(flag: str, path: str, step: int | None, fall_back: bool) -> Location:
    _check_place(flag, path)
    folder = Path(path)
    iterations = sorted(
        (part for part in (folder.iterdir() if folder.is_dir() else ()) if _ITERATION.fullmatch(part.name)),
        key=step_of,
    )
    release = [folder / RELEASE] if (folder / RELEASE).is_dir() else []
    foreign = next((part for part in [*release, *iterations] if _is_foreign(part)), None)
    complete = [part.name for part in [*release, *iterations] if _looks_complete(part)]
    half = tuple(part.name for part in iterations if part.name not in complete and part != foreign)
    tracker = Path(get_checkpoint_tracker_filename(path))
    if not tracker.exists():
        if foreign is not None:
            raise ValueError(_other_format(flag, foreign))
        if complete:
            raise ValueError(
                f"{flag} {path} holds {', '.join(complete)} but no {tracker.name}, without which none of them would be "
                f"loaded; name one there: echo {_tracker_content(complete[-1])} > {tracker}"
            )
        return Location(folder, None, half)
    named, is_release = read_tracker(tracker, [_tracker_content(name) for name in complete])
    if step is not None and is_release:
        raise ValueError(f"--ckpt-step {step}: {flag} {path} holds no steps but a converted model; leave it out.")
    if step is not None and step <= 0:
        raise ValueError(f"--ckpt-step is {step}; steps count from 1: give that of a checkpoint in {flag} {path}.")
    chosen = Path(get_checkpoint_name(path, step or named, is_release, return_base_dir=True))
    rejected: tuple[str, ...] = ()
    try:
        _check_checkpoint(flag, chosen, f"--ckpt-step {step}" if step else f"its {tracker.name}", complete)
    except DamagedError:
        earlier = [] if step or is_release or not fall_back else earlier_steps(folder, named)
        other = next((part for part in earlier if problem_of(part) is None), None)
        if other is None:
            raise
        rejected, half = (f"{flag}: {problem_of(chosen)}",), tuple(name for name in half if name != chosen.name)
        chosen = other
    newer = complete[complete.index(chosen.name) + 1 :] if chosen.name in complete and not is_release else ()
    return Location(folder, chosen, half, tuple(newer), rejected)


def _check_place(flag: str, path: str) -> None:
    """Refuses a path that cannot be a folder of checkpoints."""
    folder = Path(path)
    if not path.strip():
        raise ValueError(f"{flag} is empty; give a folder, or leave the flag out.")
    if "://" in path:
        raise ValueError(f"{flag} {path}: checkpoints are kept on a file system; give a folder there.")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{flag} {path} is a link to {folder.readlink()}, which does not exist; give another folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {path} is a file; give a folder of checkpoints.")
    has_checkpoint_name = folder.name == RELEASE or _ITERATION.fullmatch(folder.name)
    is_checkpoint = (folder / ".metadata").is_file() or any(folder.glob("*.distcp")) or _is_foreign(folder)
    has_tracker_above = Path(get_checkpoint_tracker_filename(str(folder.parent))).exists()
    if is_checkpoint or (has_checkpoint_name and has_tracker_above):
        step = _ITERATION.fullmatch(folder.name)
        which = f", with --ckpt-step {int(step[1])} for this one" if step and flag == "--load" else ""
        raise ValueError(f"{flag} {path} is one checkpoint's folder; give the one around it, {folder.parent}{which}.")


def _check_checkpoint(flag: str, chosen: Path, named_by: str, complete: list[str]) -> None:
    others = [name for name in complete if name != chosen.name]
    fix = f"complete ones there: {', '.join(others) or 'none'}"
    if others:
        tracker = get_checkpoint_tracker_filename(str(chosen.parent))
        fix += f"; write {_tracker_content(others[-1])} into {tracker} to go back to {others[-1]}"
    if not chosen.is_dir():
        raise DamagedError(f"{flag} {chosen.parent} has no {chosen.name}, which {named_by} names; {fix}.")
    if _is_foreign(chosen):
        raise ValueError(_other_format(flag, chosen))
    if not (chosen / ".metadata").is_file():
        raise DamagedError(f"{flag}: {chosen}, which {named_by} names, has no .metadata: it is half-written; {fix}.")
    if (problem := problem_of(chosen)) is not None:
        raise DamagedError(f"{flag}: {problem}; {fix}.")


def _looks_complete(folder: Path) -> bool:
    """Returns whether saving finished: torch writes `.metadata` after the weights, Megatron `metadata.json` last."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()


def _is_foreign(folder: Path) -> bool:
    """Returns whether a folder holds Megatron's older format, one file per rank."""
    return not (folder / ".metadata").exists() and any(folder.glob("mp_rank_*"))


def _other_format(flag: str, folder: Path) -> str:
    return f"{flag}: {folder} is in another format than torch_dist; save it with --ckpt-format torch_dist."


def _tracker_content(name: str) -> str:
    """Returns what a tracker file must hold to name this checkpoint's folder."""
    return name if name == RELEASE else str(int(name.removeprefix("iter_")))
