# SPDX-License-Identifier: Apache-2.0
"""Writes and reads Megatron's torch_dist checkpoints one tensor at a time.

Megatron's own save and load hold the full model in memory. This module uses the same format through the interfaces of
`torch.distributed.checkpoint`: a planner that makes each tensor only when it is written, and a reader of any part of
any tensor.
"""

from __future__ import annotations

import gc
import io
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_smar.checkpoint.folders import first_few
from megatron_smar.checkpoint.metadata import (
    DamagedError,
    file_problems,
    find_checkpoint,
    one_line,
    read_common_state,
    read_contents,
)
from megatron_smar.reliability.manifest import Places, collect

SWEEP_BYTES = 1 << 25


@dataclass(frozen=True)
class Shard:
    """A part of a tensor to be written, and a function that returns its data.

    Attributes:
        key: The tensor's name in the checkpoint.
        offsets: Offsets of the part in the full tensor.
        sizes: The part's shape, with Megatron's axes of layers and experts in front.
        shape: The full tensor's shape.
        dtype: The tensor's data type.
        read: Returns the part, in any shape with the same number of elements.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def item(self) -> WriteItem:
        """The part's description for the storage layer."""
        return WriteItem(
            index=MetadataIndex(self.key, self.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes)),
                TensorProperties(dtype=self.dtype),
                torch.Size(self.shape),
            ),
        )


class _StreamingPlanner(SavePlanner):
    """Makes each tensor when the storage layer asks for it, and keeps none."""

    def __init__(
        self, shards: Iterable[Shard], objects: Mapping[str, Callable[[], io.BytesIO]], progress: Callable[[int], None]
    ) -> None:
        self.shards = {shard.item.index: shard for shard in shards}
        self.objects = objects
        self.progress = progress
        self._unswept = 0
        gc.freeze()  # the frequent collections below need not visit older objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Does nothing: required by the interface, but there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        """Returns a plan with one item per shard and per object."""
        objects = [
            WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0))
            for name in self.objects
        ]
        return SavePlan([shard.item for shard in self.shards.values()] + objects)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Returns the plans unchanged, with the checkpoint's table of contents."""
        contents: dict[str, Any] = {name: BytesStorageMetadata() for name in self.objects}
        for shard in self.shards.values():
            data = shard.item.tensor_data
            assert data is not None
            tensor = contents.setdefault(shard.key, TensorStorageMetadata(data.properties, data.size, []))
            tensor.chunks.append(data.chunk)
        return all_plans, Metadata(contents)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns the plan unchanged: with one process there is nothing to merge."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Makes the shard or the object, and returns it."""
        if write_item.type == WriteItemType.BYTE_IO:
            return self.objects[write_item.index.fqn]()
        shard = self.shards[write_item.index]
        self._sweep()
        tensor = shard.read().to(shard.dtype).contiguous().view(shard.sizes)
        self.progress(tensor.nbytes)
        self._unswept += tensor.nbytes
        return tensor

    def _sweep(self) -> None:
        """Frees the tensors already written: torch.save leaves each in a reference cycle."""
        if self._unswept > SWEEP_BYTES:
            gc.collect()
            self._unswept = 0


class _FewTensorsPerFile(dcp.FileSystemWriter):
    """Splits the weights over files: torch 2.13 keeps the last tensor of each name until its file is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_groups(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _groups(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Groups items by file: all parts of one name together, and as many names as fit in `SWEEP_BYTES`.

    A name counts with its largest part, which is what torch keeps in memory.
    """
    by_name: dict[str, list[WriteItem]] = {}
    for item in items:
        by_name.setdefault(item.index.fqn, []).append(item)
    groups: list[list[WriteItem]] = [[]]
    kept = 0
    for parts in by_name.values():
        size = max(item.tensor_storage_size() or 0 for item in parts)
        if kept + size > SWEEP_BYTES and groups[-1]:
            groups.append([])
            kept = 0
        groups[-1] += parts
        kept += size
    return groups


def write_checkpoint(
    directory: Path, shards: Iterable[Shard], objects: Iterable[ShardedObject], args: Namespace, progress: Any
) -> None:
    """Writes a checkpoint that Megatron loads as a release, i.e. as weights without a training's history.

    Args:
        directory: The folder that --load will name.
        shards: The model's weights.
        objects: The other entries of the model's state dict.
        args: Arguments with which the trainer builds the model, for --use-checkpoint-args.
        progress: Called with the number of bytes of each tensor written.
    """
    folder = Path(get_checkpoint_name(str(directory), 0, release=True, return_base_dir=True))
    folder.mkdir(parents=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
    state = ShardedObject("common_state", common, (1,), (0,))
    write_contents(folder, shards, {o.unique_key: partial(pickled, o.data) for o in (*objects, state)}, progress)
    Path(get_checkpoint_tracker_filename(str(directory))).write_text("release")


def write_contents(
    folder: Path,
    shards: Iterable[Shard],
    objects: Mapping[str, Callable[[], io.BytesIO]],
    progress: Callable[[int], None],
) -> None:
    """Writes the content of one checkpoint's folder.

    Args:
        folder: The folder, which exists.
        shards: All tensors.
        objects: For each object besides the tensors, by its key, a function that returns it as stored (`pickled`).
        progress: Called with the number of bytes of each tensor written.
    """
    writer = _FewTensorsPerFile(folder, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended: one process
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(shards, objects, progress), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    collect(Places(folder)).write(folder)


def pickled(data: Any) -> io.BytesIO:
    """Returns an object as Megatron stores it."""
    content = io.BytesIO()
    torch.save([data], content)
    return content


class CheckpointReader:
    """Reads any part of any tensor of a torch_dist checkpoint, whatever parallel layout wrote it.

    Args:
        directory: The folder that --load names.
        iteration: The checkpoint's step; None for the latest checkpoint.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged.
    """

    def __init__(self, directory: Path, iteration: int | None = None) -> None:
        self.folder = find_checkpoint(directory, iteration)
        metadata = read_contents(self.folder)
        if problems := list(file_problems(self.folder, metadata)):
            raise DamagedError(f"{self.folder} is damaged: {first_few(problems)}; take another of its checkpoints.")
        self.common_state = read_common_state(self.folder, metadata)
        self.tensors = {
            key: data for key, data in metadata.state_dict_metadata.items() if isinstance(data, TensorStorageMetadata)
        }
        self.objects = tuple(key for key in metadata.state_dict_metadata if key not in self.tensors)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._last: tuple[str, torch.Size, Tensor] | None = None  # consecutive reads often need the same chunk

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Returns the part of a tensor that begins at `offsets` and has the shape `sizes`."""
        parts = []
        for chunk in self._candidate_chunks(key, offsets, sizes):
            begin = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(begin, end, strict=True)):
                parts.append((chunk, begin, end))
        if len(parts) == 1 and tuple(parts[0][0].offsets) == offsets and tuple(parts[0][0].sizes) == sizes:
            return self._load(key, parts[0][0])
        found = sum(math.prod(b - a for a, b in zip(begin, end, strict=True)) for _, begin, end in parts)
        if found != math.prod(sizes):
            raise ValueError(f"{self.folder} has lost a part of {key}; take another of its checkpoints.")
        result = torch.empty(sizes, dtype=self.tensors[key].properties.dtype)
        for chunk, begin, end in parts:
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True))
            if self._last is None or self._last[:2] != (key, chunk.offsets):
                self._last = None  # frees the old chunk before the next is loaded
                self._last = (key, chunk.offsets, self._load(key, chunk))
            result[there] = self._last[2][inside]
        return result

    def chunks(self, key: str) -> list[ChunkStorageMetadata]:
        """Returns the parts in which a tensor is stored."""
        return list(self.tensors[key].chunks)

    def read_object(self, key: str) -> io.BytesIO:
        """Returns an object that is not a tensor, as it is stored; it is not unpickled."""
        place = self._storage[MetadataIndex(key)]
        with open(self.folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return io.BytesIO(file.read(place.length))

    def _candidate_chunks(
        self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Iterable[ChunkStorageMetadata]:
        """Returns the chunks that may overlap: Megatron splits its leading axes, layers and experts, by index."""
        if key not in self._chunks:
            index = self._chunks[key] = {}
            for chunk in self.tensors[key].chunks:
                index.setdefault(_single_axes(chunk.offsets, chunk.sizes), []).append(chunk)
        wanted = _single_axes(offsets, sizes)
        if len(wanted) < min(2, len(sizes) - 1):
            return self.tensors[key].chunks
        return [chunk for n in range(len(wanted) + 1) for chunk in self._chunks[key].get(wanted[:n], [])]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._storage[MetadataIndex(key, chunk.offsets)]
        with open(self.folder / place.relative_path, "rb", buffering=0) as file:
            window = cast(IO[bytes], _Window(file, place))
            try:
                tensor: Tensor = torch.load(window, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file can raise any exception
                raise DamagedError(
                    f"{file.name} does not give {key} ({one_line(error)}); the checkpoint is damaged, take another one."
                ) from error
        return tensor


class _Window(io.RawIOBase):
    """Presents a part of a file as a file, from which torch reads directly into the tensor."""

    def __init__(self, file: io.RawIOBase, place: Any) -> None:
        self.file, self.start, self.length, self.position = file, place.offset, place.length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.start + self.position)
        number = self.file.readinto(wanted) or 0
        self.position += number
        return number


def _single_axes(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the offsets along the leading axes, at most two, in which a part is one element wide."""
    axes = 0
    while axes < min(2, len(sizes) - 1) and sizes[axes] == 1:
        axes += 1
    return tuple(offsets[:axes])
