# SPDX-License-Identifier: Apache-2.0
"""Loader states as tensors and Python's own types, so that ``torch.load(weights_only=True)`` can read them.

energon's states are dataclasses and a subclass of dict, which only a full unpickling could restore; and that runs
whatever code a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from megatron_smar.data.rejects import DataError

_TYPE = "__type__"
_STATES = (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState)
_DATACLASSES = {cls.__name__: cls for cls in _STATES}


def pack(value: Any) -> Any:
    """Turn a state into tensors, dicts, lists, tuples and scalars."""
    name = type(value).__name__
    if name in _DATACLASSES:
        fields = {field.name: pack(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_TYPE: name, **fields}
    if isinstance(value, dict):
        packed = {key: pack(item) for key, item in value.items()}
        return {_TYPE: name, **packed} if isinstance(value, FlexState) else packed
    if isinstance(value, list | tuple):
        return type(value)(pack(item) for item in value)
    if isinstance(value, np.ndarray):
        return {_TYPE: "ndarray", "values": torch.from_numpy(value.copy())}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", "values": torch.tensor(list(value), dtype=torch.uint8)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    raise TypeError(f"A data loader's state holds a {type(value)}, which is not known here.")


def unpack(value: Any) -> Any:
    """Turn back what `pack` made."""
    if isinstance(value, list | tuple):
        return type(value)(unpack(item) for item in value)
    if not isinstance(value, dict):
        return value
    items = {key: unpack(item) for key, item in value.items() if key != _TYPE}
    name = value.get(_TYPE)
    if name is None:
        return items
    if name == "ndarray":
        return items["values"].numpy()
    if name == "bytes":
        return bytes(items["values"].tolist())
    return FlexState(items) if name == "FlexState" else _DATACLASSES[name](**items)


def load_loader_state(path: str | Path) -> dict[str, Any]:
    """Load a state that Megatron saved (``--dataloader-save``) for `EnergonIterator.restore_state`.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["dataloader_state_dict"]
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"The data loader's state {path} cannot be loaded ({what}).") from error
