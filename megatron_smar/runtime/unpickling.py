# SPDX-License-Identifier: Apache-2.0
"""Restricts the unpickling of checkpoints to the classes that their files consist of, so that no code can run."""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any

import torch

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
# The state of --optimizer-cpu-offload names the optimizers between which it divides the parameters.
_OPTIMIZERS = (
    "torch.optim.adamw.AdamW",
    "torch.optim.adam.Adam",
    "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam",
)


class DamagedError(ValueError):
    """A checkpoint cannot be read, or refers to code that must not run; the message names the file."""


class OptimizerClass:
    """Placeholder for the class of an optimizer that is not installed here."""


class _Contents(pickle.Unpickler):
    """Unpickles a checkpoint's table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def load_contents(file: IO[bytes], path: object) -> Any:
    """Reads a checkpoint's table of contents without running any code in it.

    Args:
        file: File to read from.
        path: Path of the file, for the error message.

    Raises:
        DamagedError: The file is truncated, refers to classes other than a checkpoint's, or is not a table of contents.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with _classes_unchanged():
            contents = _Contents(file).load()
        outside = _outside(contents)
    except Exception as error:  # a broken pickle can raise anything
        raise DamagedError(f"{path} cannot be read ({one_line(error)}); the checkpoint is damaged.") from error
    if not isinstance(contents, Metadata):
        raise DamagedError(f"{path} is not the table of contents of a checkpoint; the checkpoint is damaged.")
    if outside is not None:
        raise DamagedError(f"{path} names the file {outside}, which is not in its folder; the checkpoint is damaged.")
    return contents


@contextlib.contextmanager
def _classes_unchanged() -> Iterator[None]:
    """Undoes what a pickle changed in the admitted classes, as it can: every path of the process could lead elsewhere.

    Raises:
        UnpicklingError: A class was changed.
    """
    names = [(module, name) for module, admitted_names in _ADMITTED.items() for name in admitted_names]
    found = [getattr(importlib.import_module(module), name) for module, name in names]
    before = {kind: dict(vars(kind)) for kind in found if isinstance(kind, type)}
    changed = []
    try:
        yield
    finally:
        for kind, was in before.items():
            for name in [name for name in {*was, *vars(kind)} if was.get(name) is not vars(kind).get(name)]:
                changed.append(f"{kind.__name__}.{name}")
                setattr(kind, name, was[name]) if name in was else delattr(kind, name)
    if changed:
        raise pickle.UnpicklingError(f"it changes {', '.join(changed)}")


def _outside(contents: Any) -> str | None:
    """Returns a file that a table of contents names and that is not in the checkpoint's folder, if there is one."""
    places = (getattr(contents, "storage_data", None) or {}).values()
    names = {place.relative_path for place in places if hasattr(place, "relative_path")}
    return next((str(name) for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts), None)


def load_object(content: bytes) -> Any:
    """Reads an object that Megatron stores next to the tensors, without running any code in it.

    Raises:
        Exception: The object is damaged, or refers to classes other than Megatron's own; the type can be any.
    """
    with torch.serialization.safe_globals(admitted()):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def admitted() -> list[Any]:
    """Returns the classes of the objects stored next to the tensors, which Megatron registers only on some paths."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    return [*SAFE_GLOBALS, *admitted_optimizers()]


def admitted_optimizers() -> list[Any]:
    """Returns optimizer classes with their names in a checkpoint, in the form that `torch.serialization` accepts."""
    found: list[Any] = []
    for name in _OPTIMIZERS:
        module, _, attribute = name.rpartition(".")
        known = module.startswith("torch.") or module in sys.modules
        found.append((getattr(importlib.import_module(module), attribute) if known else OptimizerClass, name))
    return found


def one_line(error: Exception) -> str:
    """Returns the first sentence of an error's message, or the error's class name if it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    head = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return head.split(". ")[0].rstrip(".:")
