# SPDX-License-Identifier: Apache-2.0
"""A device without storage: torch's fake tensors, with the host's reads of them counted and answered.

An operation on tensors of two devices raises, as it does on CUDA. What a host reads of a device has no value here, so
`Reads` gives one, and notes who asked. Tensors of the host keep their values, as far as they are small.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

_OURS = ("megatron/core", "megatron_smar")
fake_tensor.CONSTANT_NUMEL_LIMIT = 1 << 14  # elements up to which a tensor of the host keeps its values

current = torch.device("cpu")  # what torch.cuda.current_device() says


class Reads(TorchDispatchMode):
    """Counts the reads of the device by who makes them, `file:function`, while it lasts.

    Args:
        mode: The fake tensors'.
        answer: Values for a tensor that is copied to the host, by its shape and type.
    """

    def __init__(self, mode: FakeTensorMode, answer: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
        super().__init__()
        self.mode, self.answer = mode, answer
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and source.device.type != "cpu":
            if func is torch.ops.aten._local_scalar_dense.default:
                self.by[_reader()] += 1
                return {torch.bool: False}.get(source.dtype, 0.0 if source.is_floating_point() else 0)
            if func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                self.by[_reader()] += 1
                return self._known(lambda: self.answer(source.shape, source.dtype).to(source.dtype))
        made = source is None and "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
        return self._known(lambda: func(*args, **kwargs)) if made else func(*args, **kwargs)

    def _known(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of the host with its values."""
        with unset_fake_temporarily():
            values = make()
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, values, make_constant=True)


def _reader() -> str:
    """The innermost function of Megatron or ours that is running."""
    frame: Any = sys._getframe(2)
    while frame and not any(name in frame.f_code.co_filename for name in _OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}" if frame else "a test"


def stand_for_cuda() -> None:
    """What Megatron asks torch.cuda for, beside tensors: the current device, streams, events and generator states."""
    from megatron_smar.runtime import cpu_torch

    cpu_torch.provide_streams.__wrapped__()  # past the check of where it acts
    cuda: Any = torch.cuda
    cuda.current_device = lambda: current
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = random._set_cuda_rng_state = lambda *args, **kwargs: None  # type: ignore[assignment]
    random._lazy_call = lambda function, **kwargs: None  # type: ignore[attr-defined]
    _answer_methods()


def _answer_methods() -> None:
    """The methods of a tensor that ask for a driver, or that fake tensors have otherwise."""
    tensor: Any = torch.Tensor
    fake: Any = FakeTensor

    def tolist(self: Any) -> Any:
        """One copy to the host, as on CUDA, where fake tensors would be read number by number."""
        host = self.cpu()
        with unset_fake_temporarily():
            return host.constant.tolist()

    fake.tolist = tolist
    fake.is_cuda = property(lambda self: self.device.type != "cpu")  # `meta` stands for CUDA too
    tensor.cuda = lambda self, *args, **kwargs: self.to(current, non_blocking=True)
    tensor.pin_memory = lambda self: self
    tensor.record_stream = lambda self, stream: None


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device without storage, with all tensors that its modules hold; what is shared stays shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            vars(made[id(tensor)]).update(vars(tensor))
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            held.update({name: fake(value) for name, value in held.items() if isinstance(value, Tensor)})
    return model
