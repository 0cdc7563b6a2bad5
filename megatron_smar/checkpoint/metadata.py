# SPDX-License-Identifier: Apache-2.0
"""The table of contents of a torch_dist checkpoint and its run's arguments, read without running what is in them.

torch reads a checkpoint's `.metadata` with a plain unpickling, which runs whatever code a stranger's file asks for.
Here only the classes that it is made of are admitted. No tensor is read, so size does not matter.
"""

from __future__ import annotations

import importlib
import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.metadata import Metadata

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
        raise DamagedError(f"{path} cannot be read ({_told(error)}); the checkpoint is damaged.") from error
    if not isinstance(contents, Metadata):
        raise DamagedError(f"{path} is no table of contents of a checkpoint; the checkpoint is damaged.")
    return contents


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
        with path.open("rb") as file, torch.serialization.safe_globals(SAFE_GLOBALS):
            file.seek(offset)
            content = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(
            f"{path} does not give the run's arguments ({_told(error)}); the checkpoint is damaged."
        ) from error
    state: dict[str, Any] = content[0] if isinstance(content, list) else content
    return state


def saved_arguments(state: dict[str, Any]) -> Any:
    """The arguments of the run that saved a checkpoint; without any attributes where it has none."""
    return state.get("args") or types.SimpleNamespace()


def _told(error: Exception) -> str:
    """The first sentence of an error, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
