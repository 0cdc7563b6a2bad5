# SPDX-License-Identifier: Apache-2.0
"""Adaptations of torch to a machine without CUDA, for the parts of torch.cuda that Megatron calls.

Megatron uses `torch.cuda.current_device()` and `device="cuda"` wherever it creates a tensor. Here both mean the CPU.
`torch.cuda.is_available()` still returns False, so other libraries are not misled.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from megatron_smar.runtime.adaptation import Where, adaptation

CPU = torch.device("cpu")

# Every factory that Megatron calls with device="cuda".
_FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "randint",
    "arange",
    "eye",
    "linspace",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "as_tensor",
    "randperm",
    "scalar_tensor",
    "empty_strided",
]


class CpuStream:
    """A stream on the CPU, where every operation has finished before the next one begins."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Records the time on an event."""
        event = event or CpuEvent()
        event.record()
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


class CpuEvent:
    """An event on the CPU, timed by the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        """Records the time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Returns the milliseconds from this event to another."""
        return (end._time - self._time) * 1e3


def _on_cpu(device: Any) -> Any:
    """Returns the CPU for a CUDA device (given as a string, a device or an index), any other device unchanged."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    return CPU if isinstance(device, torch.device) and device.type == "cuda" else device


@adaptation("Megatron creates tensors with device='cuda'", Where.CPU)
def redirect_tensor_factories() -> None:
    """Makes `torch.zeros(..., device="cuda")` and the other factories create CPU tensors."""

    def redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    # `with torch.device(...)` recognizes factories by identity and caches them: fill its cache with the originals,
    # which the redirected ones call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, redirected(getattr(torch, name)))


@adaptation("Megatron moves tensors and modules with .cuda() and pins host memory", Where.CPU)
def redirect_tensor_moves() -> None:
    """Makes `.cuda()`, `.pin_memory()` and `.record_stream()` return the tensor unchanged."""

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]
    torch.Tensor.pin_memory = stay  # type: ignore[method-assign]
    torch.Tensor.record_stream = stay  # type: ignore[method-assign]


@adaptation("Megatron queries the current device, sets it and synchronizes with it", Where.CPU)
def provide_current_device() -> None:
    """Provides one device, the CPU, which is always current and always synchronized."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=0, minor=0, total_memory=0, name="cpu", multi_processor_count=1
    )
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_name = lambda device=None: "cpu"


@adaptation("Megatron's schedules and timers use streams and events", Where.CPU)
def provide_streams() -> None:
    """Provides streams and events on which nothing is ever pending."""
    cuda: Any = torch.cuda
    stream = CpuStream()
    cuda.Stream, cuda.Event = CpuStream, CpuEvent
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.set_stream = lambda stream: None
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False


@adaptation("Megatron keeps one CUDA generator state per purpose", Where.CPU)
def provide_random_states() -> None:
    """Makes the CUDA generator functions act on the CPU's generator."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda._lazy_call = lambda function, **kwargs: function()


@adaptation("Megatron reports the allocator's statistics", Where.CPU)
def provide_memory_statistics() -> None:
    """Reports that no CUDA memory is in use."""
    cuda: Any = torch.cuda
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)


@adaptation("Megatron binds process groups and barriers to a CUDA device", Where.CPU)
def unbind_process_groups() -> None:
    """Drops the arguments `device_id` and `device_ids`, which are for NCCL: Gloo refuses them."""

    def without(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop(name, None)
            return function(*args, **kwargs)

        return call

    dist.init_process_group = without(dist.init_process_group, "device_id")
    dist.barrier = without(dist.barrier, "device_ids")


@adaptation("the token dispatcher leaves split sizes as tensors when there is no CUDA tensor to copy", Where.CPU)
def accept_tensor_split_sizes() -> None:
    """Makes `all_to_all_single` accept split sizes that are tensors."""
    all_to_all_single = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all_single)
    def call(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group=group, async_op=async_op
        )

    dist.all_to_all_single = call


@adaptation("Megatron's optimizers sort parameters by the name of their type, torch.cuda.FloatTensor", Where.CPU)
def name_tensor_types_as_cuda() -> None:
    """Makes `tensor.type()` return the name of the CUDA type with the same element type."""
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[assignment, method-assign]


@adaptation(
    "without a GPU, Transformer Engine and apex are rightly absent, and Megatron warns about that a dozen times",
    Where.CPU,
)
def silence_missing_gpu_packages() -> None:
    """Silences those warnings and no others."""
    for missing in (
        "Apex is not installed",
        "Transformer Engine and Apex are not installed",
        "Only transformer-engine",
    ):
        warnings.filterwarnings("ignore", message=missing)


ADAPTATIONS = (
    silence_missing_gpu_packages,
    redirect_tensor_factories,
    redirect_tensor_moves,
    provide_current_device,
    provide_streams,
    provide_random_states,
    provide_memory_statistics,
    unbind_process_groups,
    accept_tensor_split_sizes,
    name_tensor_types_as_cuda,
)
