# SPDX-License-Identifier: Apache-2.0
"""Runs a program's CUDA path without a GPU: the process claims to have eight H100, and every tensor is on the CPU.

    python tests/redirected_cuda.py PROGRAM ARGUMENTS...

The program then uses CUDA's defaults and flags, and only those adaptations that apply to CUDA. In place of the device,
the CPU runtime provides the calls of torch.cuda and the adaptations of Megatron that a missing device needs; Gloo
replaces NCCL. Kernels, streams and memory are not tested.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # torch.compile would ask the driver for a stream

import torch
import torch.distributed as dist

from megatron_smar.runtime import cpu_megatron, cpu_torch

STANDS_FOR_THE_DEVICE = (
    cpu_torch.redirect_tensor_factories,
    cpu_torch.redirect_tensor_moves,
    cpu_torch.provide_current_device,
    cpu_torch.provide_streams,
    cpu_torch.provide_random_states,
    cpu_torch.provide_memory_statistics,
    cpu_torch.unbind_process_groups,
    cpu_torch.accept_tensor_split_sizes,
    cpu_torch.name_tensor_types_as_cuda,
)
STANDS_FOR_THE_DEVICE_IN_MEGATRON = (cpu_megatron.keep_one_random_state, cpu_megatron.give_numpy_split_sizes)
ON_HOST = "_was_moved_to_the_host"  # marks a tensor


def claim_cuda(gpus: int = 8, capability: tuple[int, int] = (9, 0)) -> None:
    """Makes torch claim to have GPUs; call it before any part of Megatron is imported."""
    cuda: Any = torch.cuda
    for stand_in in STANDS_FOR_THE_DEVICE:
        stand_in.__wrapped__()  # without the check of where the adaptation applies
    cuda.is_available, cuda.is_initialized, cuda.device_count = (lambda: True), (lambda: True), (lambda: gpus)
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        total_memory=80 << 30,
        name="simulated H100",
        multi_processor_count=132,
    )
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: capability
    cuda.get_device_name = lambda device=None: properties.name
    cuda.is_bf16_supported = lambda including_emulation=True: True
    accelerator: Any = torch.accelerator
    accelerator.current_device_index = lambda: 0
    accelerator.current_stream = lambda device=None: types.SimpleNamespace(is_capturing=lambda: False)
    _claim_tensors()
    _take_gloo()
    os.environ["MEGATRON_SMAR_DEVICE"] = "cuda"


def stand_for_the_device_in_megatron() -> None:
    """Replaces the device in Megatron; call it after `runtime.install()`, since it imports Megatron."""
    for stand_in in STANDS_FOR_THE_DEVICE_IN_MEGATRON:
        stand_in.__wrapped__()


def _claim_tensors() -> None:
    """Makes `is_cuda` true, except for tensors moved to the host and tensors made from them (offloaded optimizer)."""
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: not hasattr(self, ON_HOST))
    to_cpu = tensor.cpu

    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = to_cpu(self, *args, **kwargs).clone()
        setattr(result, ON_HOST, True)
        return result

    def keeping_the_mark(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            if hasattr(self, ON_HOST):
                setattr(result, ON_HOST, True)
            return result

        return call

    for name in ("detach", "clone", "float", "pin_memory"):
        setattr(tensor, name, keeping_the_mark(getattr(tensor, name)))
    tensor.cpu = move


def _take_gloo() -> None:
    init, new_group = dist.init_process_group, dist.new_group

    def with_gloo(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = "gloo"
            kwargs.pop("pg_options", None)
            return function(*args, **kwargs)

        return call

    dist.init_process_group, dist.new_group = with_gloo(init), with_gloo(new_group)


def main() -> None:
    """Runs a program of the project as if on CUDA."""
    claim_cuda()
    from megatron_smar import runtime

    runtime.install()
    stand_for_the_device_in_megatron()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
