# SPDX-License-Identifier: Apache-2.0
"""Adaptations of Megatron to a machine without CUDA that redirecting torch does not cover."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_smar.runtime.adaptation import Where, adaptation


@adaptation("pretrain() does not pass allow_no_cuda on to initialize_megatron()", Where.CPU)
def allow_no_cuda() -> None:
    """Lets `pretrain()` start on a machine without CUDA."""
    import megatron.training as package
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (package, initialize, training):
        module.initialize_megatron = start


@adaptation(
    "tensor_parallel.random imports torch.cuda's functions by name and accesses CUDA generators directly", Where.CPU
)
def keep_one_random_state() -> None:
    """Makes Megatron's tracker of random states switch the CPU's generator."""
    import megatron.core.tensor_parallel.random as random

    patched: Any = random
    patched._lazy_call = lambda function, **kwargs: function()
    patched._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


@adaptation(
    "the dispatcher asks for NumPy split sizes, and gets a tensor when there is no CUDA tensor to copy", Where.CPU
)
def give_numpy_split_sizes() -> None:
    """Makes `maybe_move_tensor_to_cpu(..., as_numpy=True)` return a NumPy array for CPU tensors too."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def as_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = as_host
    token_dispatcher.maybe_move_tensor_to_cpu = as_host


ADAPTATIONS = (allow_no_cuda, keep_one_random_state, give_numpy_split_sizes)
