# SPDX-License-Identifier: Apache-2.0
"""Finds a torch_dist checkpoint and reads its table of contents and its run's arguments, without running code in them.

torch unpickles a checkpoint's `.metadata` without restrictions, which runs whatever code an untrusted file asks for.
Here only the classes that `.metadata` consists of are admitted (`runtime/unpickling.py`). No tensor is read, so the
checkpoint's size does not matter.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_smar.runtime.unpickling import DamagedError, load_contents, load_object, one_line

__all__ = [
    "DamagedError",
    "check_objects",
    "file_problems",
    "find_checkpoint",
    "one_line",
    "read_common_state",
    "read_contents",
    "run_arguments",
    "saved_arguments",
]


COMMON_STATE = "common_state/"  # prefix of its key in the checkpoint


def find_checkpoint(path: Path, iteration: int | None = None) -> Path:
    """Returns the folder of one checkpoint.

    Args:
        path: The folder that --load takes, or the folder of one of its checkpoints.
        iteration: The checkpoint's step; None for the latest checkpoint.

    Raises:
        ValueError: There is no checkpoint, or not this one, or its format is not torch_dist.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give that of a checkpoint, as --load takes it.")
    tracker = Path(get_checkpoint_tracker_filename(str(path)))
    folder = path
    if iteration is not None:
        folder = Path(get_checkpoint_name(str(path), iteration, False, return_base_dir=True))
    elif tracker.is_file():
        folder = Path(get_checkpoint_name(str(path), *read_tracker(tracker), return_base_dir=True))
    elif not (path / ".metadata").is_file() and not any(path.glob("*.distcp")):
        raise ValueError(f"{path} holds no checkpoint: it has no {tracker.name}; give the folder that --save named.")
    if not folder.is_dir():
        there = ", ".join(sorted(part.name for part in path.glob("iter_*"))) or "none"
        raise ValueError(f"{path} has no {folder.name}; there are: {there}.")
    if not (folder / ".metadata").is_file():
        if any(folder.glob("*.distcp")):
            raise ValueError(f"{folder} has no .metadata: its saving was cut off, or it is damaged; take another one.")
        raise ValueError(f"{folder} is in another format than torch_dist; save it with --ckpt-format torch_dist.")
    return folder


def read_tracker(tracker: Path, there: Sequence[str] = ()) -> tuple[int, bool]:
    """Reads a tracker file. Where it names nothing, Megatron's own reader ends the program with status 0.

    Args:
        tracker: The file.
        there: Steps that it could name, for the error message.

    Returns:
        The step, and whether it is a release.

    Raises:
        DamagedError: The file names neither a step nor a release.
    """
    try:
        content = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{tracker} cannot be read ({one_line(error)}); write a checkpoint's step there.") from error
    if content == "release":
        return 0, True
    if not re.fullmatch("[0-9]+", content):
        raise DamagedError(
            f"{tracker} names no step but {content[:40]!r}; write there the step of a complete checkpoint beside it"
            f"{': ' if there else ''}{', '.join(there)}."
        )
    return int(content), False


def read_contents(folder: Path) -> Metadata:
    """Reads a checkpoint's table of contents: what it holds, and in which files.

    Args:
        folder: The checkpoint's folder, such as CKPT/iter_0000100.

    Raises:
        DamagedError: The table is missing, truncated, or asks for classes that do not belong there.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            contents: Metadata = load_contents(file, path)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({one_line(error)}); the checkpoint is damaged.") from error
    return contents


def file_problems(folder: Path, contents: Metadata) -> Iterator[str]:
    """Yields what is wrong with a checkpoint's files: those that are missing or too short."""
    needed: dict[str, int] = {}
    for place in contents.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, length in sorted(needed.items()):
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size < length:
            yield f"{name} has {file.stat().st_size} of {length} bytes"
    if not (folder / "metadata.json").is_file():
        yield "metadata.json is missing"


def read_common_state(folder: Path, contents: Metadata) -> dict[str, Any]:
    """Reads everything but weights (the run's arguments, its step, the scheduler) the way Megatron reads it.

    Raises:
        DamagedError: The common state is missing or cannot be read.
    """
    path, offset, length = folder / COMMON_STATE_FNAME, 0, -1  # a file of its own in older releases of Megatron
    if not path.is_file():
        places = (place for index, place in contents.storage_data.items() if index.fqn.startswith(COMMON_STATE))
        if (place := next(places, None)) is None:
            raise DamagedError(f"{folder} holds no arguments of a run; Megatron did not write it, or it is damaged.")
        path, offset, length = folder / place.relative_path, place.offset, place.length
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = load_object(file.read(length))
    except Exception as error:
        raise DamagedError(
            f"{path} does not give the run's arguments ({one_line(error)}); the checkpoint is damaged."
        ) from error
    state: dict[str, Any] = content[0] if isinstance(content, list) else content
    return state


def saved_arguments(state: dict[str, Any]) -> Any:
    """Returns the arguments of the run that saved a checkpoint; an object without attributes if none are stored."""
    return state.get("args") or types.SimpleNamespace()


def run_arguments(load: Path, iteration: int | None = None) -> Any:
    """Returns the arguments of the run, or of the import, that saved a checkpoint.

    Args:
        load: The folder, as `find_checkpoint` takes it.
        iteration: The checkpoint's step; None for the latest checkpoint.
    """
    folder = find_checkpoint(load, iteration)
    return saved_arguments(read_common_state(folder, read_contents(folder)))


def check_objects(folder: Path, contents: Metadata, share: int = 0, shares: int = 1) -> None:
    """Reads the objects stored besides the tensors (random states and the like) safely, and discards them.

    Args:
        folder: The checkpoint's folder.
        contents: The checkpoint's table of contents.
        share: Number of the share to read, from 0: several ranks divide the objects among them.
        shares: Number of shares.

    Raises:
        DamagedError: An object cannot be read, or asks for code to be run.
    """
    kinds = contents.state_dict_metadata
    objects = [index for index in contents.storage_data if isinstance(kinds.get(index.fqn), BytesStorageMetadata)]
    for index in sorted(objects, key=lambda index: index.fqn)[share::shares]:
        place = contents.storage_data[index]
        path = folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                load_object(file.read(place.length))
        except Exception as error:
            raise DamagedError(
                f"{path} does not give {index.fqn} ({one_line(error)}); the checkpoint is damaged."
            ) from error
