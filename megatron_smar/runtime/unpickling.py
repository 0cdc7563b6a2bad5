# SPDX-License-Identifier: Apache-2.0
"""What may be unpickled out of a checkpoint: the classes that its files are made of, and nothing that runs."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
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
# The state of --optimizer-cpu-offload names the optimizers that it divides the parameters between.
_OPTIMIZERS = (
    "torch.optim.adamw.AdamW",
    "torch.optim.adam.Adam",
    "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam",
)


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or asks for something to be run; the message names the file."""


class OptimizerClass:
    """Stands for the class of an optimizer that is not installed here."""


class _Contents(pickle.Unpickler):
    """Unpickles a checkpoint's table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def load_contents(file: IO[bytes], path: object) -> Any:
    """A checkpoint's table of contents, without running what is in it.

    Args:
        file: Where it is read from.
        path: Its name, for the sentence.

    Raises:
        DamagedError: It is cut off, asks for classes that do not belong there, or is something else.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        contents = _Contents(file).load()
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise DamagedError(f"{path} cannot be read ({one_line(error)}); the checkpoint is damaged.") from error
    if not isinstance(contents, Metadata):
        raise DamagedError(f"{path} is no table of contents of a checkpoint; the checkpoint is damaged.")
    return contents


def load_object(content: bytes) -> Any:
    """An object that Megatron keeps beside the tensors, without running what is in it.

    Raises:
        Exception: Whatever its bytes lead to, if it is damaged or asks for other classes than Megatron's own.
    """
    with torch.serialization.safe_globals(admitted()):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def admitted() -> list[Any]:
    """The classes of the objects beside the tensors: Megatron's own, which it registers on some paths only."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    return [*SAFE_GLOBALS, *admitted_optimizers()]


def admitted_optimizers() -> list[Any]:
    """Optimizers' classes with the names under which a checkpoint has them, as `torch.serialization` takes them."""
    found: list[Any] = []
    for name in _OPTIMIZERS:
        module, _, attribute = name.rpartition(".")
        known = module.startswith("torch.") or module in sys.modules
        found.append((getattr(importlib.import_module(module), attribute) if known else OptimizerClass, name))
    return found


def one_line(error: Exception) -> str:
    """Returns the first sentence of an error's message, or the error's class name."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    head = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return head.split(". ")[0].rstrip(".:")
