# SPDX-License-Identifier: Apache-2.0
"""A torch_dist checkpoint's place, table of contents and its run's arguments, read without running what is in them.

torch reads a checkpoint's `.metadata` with a plain unpickling, which runs whatever code a stranger's file asks for.
Here only the classes that it is made of are admitted. No tensor is read, so size does not matter.
"""

from __future__ import annotations

import importlib
import io
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint.metadata import Metadata


class OptimizerClass:
    """Stands for an optimizer's class, which the state of `--optimizer-cpu-offload` names and nobody here needs."""


_STAND_INS = [
    (OptimizerClass, "torch.optim.adamw.AdamW"),
    (OptimizerClass, "torch.optim.adam.Adam"),
    (OptimizerClass, "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"),
]
COMMON_STATE = "common_state/"  # the beginning of its key
_CHECKPOINT = "torch.distributed.checkpoint"
_ADMITTED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath"},
}


class DamagedError(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


class _Contents(pickle.Unpickler):
    """Unpickles a checkpoint's table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def find_checkpoint(path: Path, iteration: int | None = None) -> Path:
    """The folder of one checkpoint.

    Args:
        path: The folder that --load takes, or that of one of its checkpoints.
        iteration: Which one; None for the latest.

    Raises:
        ValueError: There is none, or not this one, or in another format than torch_dist.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give that of a checkpoint, as --load takes it.")
    tracker = Path(get_checkpoint_tracker_filename(str(path)))
    folder = path
    if iteration is not None:
        folder = Path(get_checkpoint_name(str(path), iteration, False, return_base_dir=True))
    elif tracker.is_file():
        folder = Path(get_checkpoint_name(str(path), *_latest(tracker), return_base_dir=True))
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


def _latest(tracker: Path) -> tuple[int, bool]:
    """The iteration, and whether it is a release; Megatron's own reader ends the program where it is neither."""
    content = tracker.read_text(encoding="utf-8").strip()
    if content == "release":
        return 0, True
    if not content.isdigit():
        raise DamagedError(
            f"{tracker} names no step but {content[:40]!r}; write the step of a checkpoint beside it there."
        )
    return int(content), False


def read_contents(folder: Path) -> Metadata:
    """What a checkpoint holds, and in which files.

    Args:
        folder: One checkpoint's, such as CKPT/iter_0000100.

    Raises:
        DamagedError: There is no such table, or it is cut off, or asks for classes that do not belong there.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            contents = _Contents(file).load()
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise DamagedError(f"{path} cannot be read ({told(error)}); the checkpoint is damaged.") from error
    if not isinstance(contents, Metadata):
        raise DamagedError(f"{path} is no table of contents of a checkpoint; the checkpoint is damaged.")
    return contents


def file_problems(folder: Path, contents: Metadata) -> Iterator[str]:
    """What is wrong with a checkpoint's files: those that are missing or too short."""
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
    """What belongs to no weight: the run's arguments, its step, the scheduler; read as Megatron reads it.

    Raises:
        DamagedError: It is missing or cannot be read.
    """
    path, offset, length = folder / COMMON_STATE_FNAME, 0, -1  # older releases of Megatron
    if not path.is_file():
        places = (place for index, place in contents.storage_data.items() if index.fqn.startswith(COMMON_STATE))
        if (place := next(places, None)) is None:
            raise DamagedError(f"{folder} holds no arguments of a run; Megatron did not write it, or it is damaged.")
        path, offset, length = folder / place.relative_path, place.offset, place.length
    try:
        with path.open("rb") as file, torch.serialization.safe_globals([*SAFE_GLOBALS, *_STAND_INS]):
            file.seek(offset)
            content = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(
            f"{path} does not give the run's arguments ({told(error)}); the checkpoint is damaged."
        ) from error
    state: dict[str, Any] = content[0] if isinstance(content, list) else content
    return state


def saved_arguments(state: dict[str, Any]) -> Any:
    """The arguments of the run that saved a checkpoint; without any attributes where it has none."""
    return state.get("args") or types.SimpleNamespace()


def told(error: Exception) -> str:
    """The first sentence of an error, or its name."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    head = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return head.split(". ")[0].rstrip(".:")
