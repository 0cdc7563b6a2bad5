# SPDX-License-Identifier: Apache-2.0
"""Asynchronous saves from a thread of the rank, which writes staged copies while training continues.

Megatron 0.19.2 writes from another process, to which it passes views of CPU tensors: training would change what is
being written. That process imports everything again at the first save, and reports the class of an error only.
"""

from __future__ import annotations

import functools
import io
import threading
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_smar.runtime.adaptation import Where, adaptation


class ThreadCaller(AsyncCaller):
    """Runs one asynchronous save in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: Any) -> None:
        """Stages the tensors and starts the thread; called on all ranks."""
        if async_req.async_fn is None:
            return  # this rank writes nothing
        arguments = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            arguments[1] = async_req.preload_fn()
        self._thread = threading.Thread(
            target=async_req.async_fn, args=arguments, kwargs=async_req.async_fn_kwargs, daemon=True
        )
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Returns whether all ranks have written; with `blocking`, waits for this rank. Called on all ranks."""
        if blocking:
            self.close()
        is_alive = int(self._thread is not None and self._thread.is_alive())
        done = not is_alive if no_dist else bool(self.sync_all_async_calls(is_alive))
        if done:
            self.close()
        return done or blocking

    def close(self, abort: bool = False) -> None:
        """Waits for the thread, unless the program ends and gives the save up."""
        if self._thread is not None and not abort:
            self._thread.join()
            self._thread = None

    def __del__(self) -> None:
        """Does nothing: the interface requires it."""


# Memory that is touched for the first time is slow, so the copies of the last save are used again.
_STAGED: dict[MetadataIndex, Tensor] = {}


def staged_copy(key: MetadataIndex, tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor in the host's memory, which the next save of the same part will overwrite.

    Args:
        key: Which part of the checkpoint the tensor is.
        tensor: The tensor, on any device; its copy is complete after a synchronization of that device.
    """
    copy = _STAGED.get(key)
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
        copy = _STAGED[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    copy.copy_(tensor.detach(), non_blocking=True)
    return copy


class StagingPlanner:
    """Gives a writer staged copies of the tensors that a planner finds.

    Args:
        planner: The planner of the save.
    """

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        """Returns what one item of the plan writes."""
        data = self._planner.resolve_data(item)
        return staged_copy(item.index, data) if isinstance(data, Tensor) else data


@adaptation(
    "--async-save on the CPU writes views of tensors that training changes meanwhile, from a process that starts at "
    "the first save; and without --use-persistent-ckpt-worker Megatron disables it",
    Where.ANYWHERE,
)
def write_asynchronous_saves_from_a_thread() -> None:
    """Makes --async-save stage copies and write them from a thread of the rank."""
    import megatron.core.dist_checkpointing.strategies.async_utils as strategies
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import get_args

    prepare = FileSystemWriterAsync.prepare_write_data

    # Here and not in preload_tensors, which comes after this has cloned each view into memory of its own.
    @functools.wraps(prepare)
    def prepare_copies(self: FileSystemWriterAsync, plan: SavePlan, planner: Any) -> None:
        prepare(self, plan, StagingPlanner(planner) if get_args().async_save else planner)

    strategies.AsyncCallsQueue._get_async_caller = lambda self: ThreadCaller()
    strategies.AsyncCallsQueue.warmup_persistent_caller = lambda *args, **kwargs: None
    FileSystemWriterAsync.prepare_write_data = prepare_copies


ADAPTATIONS = (write_asynchronous_saves_from_a_thread,)
