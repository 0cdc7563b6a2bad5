# SPDX-License-Identifier: Apache-2.0
"""Small functions of the routing, compiled on a GPU as Megatron compiles its own: by `megatron.core.jit.jit_fuser`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import jit
from torch import Tensor


class FusedFunction[Result]:
    """A function of tensors that runs compiled on CUDA, where each of its operations would launch a kernel.

    On the CPU, where compiling takes longer than it saves, and with --disable-jit-fuser, which Megatron evaluates after
    this module is imported, it runs as it is. TORCH_COMPILE_DISABLE=1 turns compiling off, as for Megatron's functions.

    Args:
        function: Its first argument is a tensor; it computes no gradients.
    """

    __name__: str

    def __init__(self, function: Callable[..., Result]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._compiled: Callable[..., Result] | None = None

    def __call__(self, first: Tensor, *others: Any) -> Result:
        """Calls the function, compiled if `first` is on a GPU."""
        if not first.is_cuda:
            return self.function(first, *others)
        if self._compiled is None:
            self._compiled = jit.jit_fuser(self.function)
        return self._compiled(first, *others)


@functools.lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers as a tensor [len(values)], copied to the device once.

    A compiled function takes any values of a tensor, but is compiled again for each value of a float.
    """
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host without blocking, as is only possible from pinned memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
