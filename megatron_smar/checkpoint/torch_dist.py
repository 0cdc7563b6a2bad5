# SPDX-License-Identifier: Apache-2.0
"""Megatron's torch_dist checkpoints, written and read one tensor at a time.

Megatron's own save and load hold a whole model in memory. These use the same format by the interfaces of
`torch.distributed.checkpoint`: a planner that makes each tensor when its turn to be written comes, and a reader of any
part of any tensor.
"""

from __future__ import annotations

import gc
import io
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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

from megatron_smar.checkpoint.folders import some
from megatron_smar.checkpoint.metadata import (
    DamagedError,
    file_problems,
    find_checkpoint,
    read_common_state,
    read_contents,
    told,
)

SWEEP_BYTES = 1 << 25


@dataclass(frozen=True)
class Shard:
    """A part of a tensor that is to be written, and how to get it.

    Attributes:
        key: The tensor's name in the checkpoint.
        offsets: Where the part begins.
        sizes: Its shape, with Megatron's axes of layers and experts in front.
        shape: The whole tensor's shape.
        dtype: Its data type.
        read: Gives the part, of any shape with as many elements.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def item(self) -> WriteItem:
        """What the storage layer is told of it."""
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
    """Gives the storage layer each tensor when it asks for it, and keeps none."""

    def __init__(self, shards: Iterable[Shard], objects: dict[str, Any], progress: Callable[[int], None]) -> None:
        self.shards = {shard.item.index: shard for shard in shards}
        self.objects = objects
        self.progress = progress
        self._unswept = 0
        gc.freeze()  # what was made before now need not be looked at again

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """The interface's; there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        """One item per shard and per object."""
        objects = [
            WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0))
            for name in self.objects
        ]
        return SavePlan([shard.item for shard in self.shards.values()] + objects)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The checkpoint's table of contents."""
        contents: dict[str, Any] = {name: BytesStorageMetadata() for name in self.objects}
        for shard in self.shards.values():
            data = shard.item.tensor_data
            assert data is not None
            whole = contents.setdefault(shard.key, TensorStorageMetadata(data.properties, data.size, []))
            whole.chunks.append(data.chunk)
        return all_plans, Metadata(contents)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to merge: one process plans."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The shard or object, made now."""
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], content)
            return content
        shard = self.shards[write_item.index]
        self._sweep()
        tensor = shard.read().to(shard.dtype).contiguous().view(shard.sizes)
        self.progress(tensor.nbytes)
        self._unswept += tensor.nbytes
        return tensor

    def _sweep(self) -> None:
        """Frees the tensors written before: torch.save leaves each in a cycle of references."""
        if self._unswept > SWEEP_BYTES:
            gc.collect()
            self._unswept = 0


class _FewTensorsPerFile(dcp.FileSystemWriter):
    """Spreads the weights over files: torch 2.13 keeps the last tensor of each name until its file is done."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_groups(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _groups(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Items by file: all parts of a name in one, and as many names as together keep little in memory."""
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
        directory: As --load will name it.
        shards: The model's weights.
        objects: What else the model's state dict has.
        args: Arguments under which the trainer builds the model, for --use-checkpoint-args.
        progress: Called with the bytes of each tensor.
    """
    folder = Path(get_checkpoint_name(str(directory), 0, release=True, return_base_dir=True))
    folder.mkdir(parents=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
    state = ShardedObject("common_state", common, (1,), (0,))
    named = {piece.unique_key: piece.data for piece in (*objects, state)}
    writer = _FewTensorsPerFile(folder, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(shards, named, progress), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    Path(get_checkpoint_tracker_filename(str(directory))).write_text("release")


class CheckpointReader:
    """Reads any part of any tensor of a torch_dist checkpoint, whatever layout wrote it.

    Args:
        directory: As --load names it.
        iteration: Which of its checkpoints; None for the latest.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged.
    """

    def __init__(self, directory: Path, iteration: int | None = None) -> None:
        self.folder = find_checkpoint(directory, iteration)
        metadata = read_contents(self.folder)
        if problems := list(file_problems(self.folder, metadata)):
            raise DamagedError(f"{self.folder} is damaged: {some(problems)}; take another of its checkpoints.")
        self.common_state = read_common_state(self.folder, metadata)
        self.tensors = {
            key: data for key, data in metadata.state_dict_metadata.items() if isinstance(data, TensorStorageMetadata)
        }
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._last: tuple[str, torch.Size, Tensor] | None = None  # parts of one are often asked for one after another

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The part of a tensor that begins at `offsets` and has the shape `sizes`."""
        parts = []
        for chunk in self._near(key, offsets, sizes):
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
                self._last = None  # before the next takes its place
                self._last = (key, chunk.offsets, self._load(key, chunk))
            result[there] = self._last[2][inside]
        return result

    def _near(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterable[ChunkStorageMetadata]:
        """The chunks that may overlap: Megatron cuts its leading axes, layers and experts, into single indices."""
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
            except Exception as error:  # a broken file raises whatever its bytes lead to
                raise DamagedError(
                    f"{file.name} does not give {key} ({told(error)}); the checkpoint is damaged, take another one."
                ) from error
        return tensor


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, from which torch reads straight into the tensor."""

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
    """Offsets along the leading axes where a part is one element wide, but at most of two."""
    axes = 0
    while axes < min(2, len(sizes) - 1) and sizes[axes] == 1:
        axes += 1
    return tuple(offsets[:axes])
