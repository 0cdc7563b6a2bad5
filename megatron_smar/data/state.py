# SPDX-License-Identifier: Apache-2.0
"""Loader states as tensors and Python's own types, so that `torch.load(weights_only=True)` can read them.

energon's states are dataclasses and a subclass of dict. Only full unpickling could restore those, and full unpickling
runs any code that a checkpoint contains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
WORKER_BATCHES = "micro-batches in each worker's data"
_STATES = (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState)
_DATACLASSES = {cls.__name__: cls for cls in _STATES}


def to_plain(value: Any) -> Any:
    """Converts a state to tensors, dicts, lists, tuples and scalars."""
    name = type(value).__name__
    if name in _DATACLASSES:
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_TYPE: name, **fields}
    if isinstance(value, dict):
        items = {key: to_plain(item) for key, item in value.items()}
        return {_TYPE: name, **items} if isinstance(value, FlexState) else items
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return {_TYPE: "ndarray", "values": torch.from_numpy(value.copy())}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", "values": torch.tensor(list(value), dtype=torch.uint8)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    raise TypeError(f"A data loader's state holds a {type(value)}, which is not supported here.")


def from_plain(value: Any) -> Any:
    """Converts the result of `to_plain` back to the original state."""
    if isinstance(value, list | tuple):
        return type(value)(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    items = {key: from_plain(item) for key, item in value.items() if key != _TYPE}
    name = value.get(_TYPE)
    if name is None:
        return items
    if name == "ndarray":
        return items["values"].numpy()
    if name == "bytes":
        return bytes(items["values"].tolist())
    return FlexState(items) if name == "FlexState" else _DATACLASSES[name](**items)


def load_loader_state(path: str | Path) -> dict[str, Any]:
    """Loads a state that Megatron saved (`--dataloader-save`) for `EnergonIterator.restore_state`.

    Raises:
        DataError: The file does not exist, or contains something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["dataloader_state_dict"]
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The data loader's state {path} cannot be loaded ({what}): give --dataloader-save the folder of the "
            "previous run, or begin at the start of the data with --no-load-dataloader-state."
        ) from error


def load_rank_state(
    path_of: Callable[[int], str | Path], rank: int, size: int, num_workers: int, num_microbatches: int
) -> dict[str, Any]:
    """Loads the state from which a data-parallel rank resumes; the number of ranks may have changed since saving.

    Args:
        path_of: Returns the path of the state file of a data-parallel rank of the saving run.
        rank: Data-parallel rank of this process.
        size: Data-parallel size of this run.
        num_workers: Data workers of each rank.
        num_microbatches: Micro-batches per step on each rank.

    Returns:
        The state for `EnergonIterator.restore_state`, which compares the rest of the layout.

    Raises:
        DataError: A file cannot be loaded, or the workers cannot be redistributed without changing the order of
            samples.
    """
    first = load_loader_state(path_of(0))
    saved = first["layout"]
    if (saved["data-parallel size"], saved["--num-workers"]) == (size, num_workers):
        return first if rank == 0 else load_loader_state(path_of(rank))
    states = [first, *(load_loader_state(path_of(other)) for other in range(1, saved["data-parallel size"]))]
    return redistribute(states, rank, size, num_workers, num_microbatches)


def redistribute(
    states: list[dict[str, Any]], rank: int, size: int, num_workers: int, num_microbatches: int
) -> dict[str, Any]:
    """Distributes the workers of all saved ranks over another number of ranks; each step keeps its samples.

    energon assigns shards to a worker by its index among all workers of all ranks, whichever rank it runs on. A rank
    reads from its workers in turn. The same total number of workers therefore reads the same samples in each step, if
    each worker supplies the same number of micro-batches to each step.

    Args:
        states: The states of all ranks of the saving run, in rank order.
        rank: Data-parallel rank of this process.
        size: Data-parallel size of this run.
        num_workers: Data workers of each rank.
        num_microbatches: Micro-batches per step on each rank.

    Raises:
        DataError: The total number of workers has changed, or a step does not take the same number of micro-batches
            from each worker.
    """
    layout = states[0]["layout"]
    old_size, old_workers = layout["data-parallel size"], layout["--num-workers"]
    change = (
        f"the checkpoint was saved with {old_size} data-parallel ranks x --num-workers {old_workers}, and this run has "
        f"{size} x --num-workers {num_workers}"
    )
    if old_size * old_workers != size * num_workers or 0 in (old_workers, num_workers):
        wanted = f"--num-workers {old_size * old_workers // size}"
        possible = old_workers and old_size * old_workers % size == 0
        raise DataError(
            f"The data loader cannot resume: {change}, but the order of samples depends on the number of workers of "
            f"all ranks together: {f'give {wanted}' if possible else 'resume with what it was saved with'}, or read "
            "the data from its start with --no-load-dataloader-state."
        )
    if num_microbatches % num_workers or any(state["loader"]["next_worker_id"] for state in states):
        raise DataError(
            f"The data loader cannot resume: {change}, which gives the same samples only if each worker supplies as "
            f"many micro-batches to a step, but a step has {num_microbatches} on a rank: resume with what it was saved "
            "with."
        )
    workers = [worker for state in states for worker in state["loader"]["worker_states"]]
    batches = [number for state in states for number in state["layout"][WORKER_BATCHES]]
    mine = slice(rank * num_workers, (rank + 1) * num_workers)
    place = {"data-parallel size": size, "--num-workers": num_workers, WORKER_BATCHES: batches[mine]}
    return {"layout": layout | place, "loader": states[0]["loader"] | {"worker_states": workers[mine]}}
