# SPDX-License-Identifier: Apache-2.0
"""A device without storage: torch's fake tensors, with the host's waits counted and its reads answered.

An operation on tensors of two devices raises an error, as on CUDA; so does an operation whose output size depends on
the device's data. What the host reads from the device has no value here, so `Waits` provides one and records the
reader. Small tensors of the host keep their values.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import megatron_smar

_PACKAGES = tuple(f"{folder}/" for folder in (Path(megatron.core.__file__).parents[1], *megatron_smar.__path__))
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
fake_tensor.CONSTANT_NUMEL_LIMIT = 1 << 14  # elements up to which a tensor of the host keeps its values

current = torch.device("cpu")  # returned by torch.cuda.current_device()
_counting: list[Waits] = []


class Waits(TorchDispatchMode):
    """Counts within the context what makes the host wait for the device, by kind and caller: `read file:function`.

    - `read`: a value or tensor of the device is copied to the host, now or by a copy that is waited for later;
    - `upload`: a copy to the device that is blocking, or from memory that is not pinned;
    - `wait`: for an event, a stream or the entire device.

    Args:
        mode: Mode of the fake tensors.
        answer: Function that returns values for a tensor that is copied to the host, from its shape and dtype.
    """

    def __init__(self, mode: FakeTensorMode, answer: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
        super().__init__()
        self.mode, self.answer = mode, answer
        self.by: Counter[str] = Counter()

    def __enter__(self) -> Waits:
        _counting.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _counting.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func, args, kwargs)
        if kind:
            self.by[f"{kind} {_who()}"] += 1
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if kind == "read" and func is _aten._local_scalar_dense.default:
            return {torch.bool: False}.get(source.dtype, 0.0 if source.is_floating_point() else 0)
        if func is _aten.nonzero.default and not _on_device(source):  # of the device's it is an error: a size it knows
            return self.known(source.constant.nonzero)
        if kind == "read" and func is _aten._to_copy.default:
            return self.known(lambda: self.answer(source.shape, source.dtype).to(source.dtype))
        made = source is None and "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
        return self.known(lambda: func(*args, **kwargs)) if made else func(*args, **kwargs)

    def known(self, make: Callable[[], Tensor]) -> Tensor:
        """Returns a fake tensor of the host that keeps its values."""
        with unset_fake_temporarily():
            values = make()
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, values, make_constant=True)


def _kind(func: Any, args: Any, kwargs: Any) -> str | None:
    """Returns how an operation makes the host wait, or None if it does not."""
    if func is _aten._local_scalar_dense.default:
        return "read" if _on_device(args[0]) else None
    if func in _INDEXING:  # torch moves indices on the host to the device with a blocking copy
        indices = [index for index in args[1] if index is not None]
        return None if all(map(_on_device, indices)) or not _on_device(args[0]) else "upload"
    if func is _aten._to_copy.default:
        source, to = args[0], torch.device(kwargs.get("device") or args[0].device).type != "cpu"
        blocks = not kwargs.get("non_blocking", False)
    elif func is _aten.copy_.default:
        source, to = args[1], _on_device(args[0])
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        return None
    if _on_device(source) == to:
        return None
    return "read" if not to else "upload" if blocks or not getattr(source, "pinned", False) else None


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _who() -> str:
    """Returns the innermost running function of Megatron or of this project."""
    frame: Any = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(_PACKAGES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}" if frame else "a test"


def _wait(*args: Any) -> None:
    if _counting:
        _counting[-1].by[f"wait {_who()}"] += 1


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that makes a dataclass of real tensors: they become fake tensors that keep their values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            made = function(*args, **kwargs)
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(made, **{name: _counting[-1].known(lambda v=v: v) for name, v in tensors.items()})

    return call


def stand_for_cuda() -> None:
    """Replaces what Megatron uses of torch.cuda: the current device, streams, events and generator states."""
    from megatron_smar.runtime import cpu_torch

    cpu_torch.provide_streams.__wrapped__()  # without the check of where the adaptation applies
    cuda: Any = torch.cuda
    cuda.current_device = lambda: current
    cuda.synchronize = _wait
    cpu_torch.CpuStream.synchronize = cpu_torch.CpuEvent.synchronize = _wait
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = random._set_cuda_rng_state = lambda *args, **kwargs: None
    random._lazy_call = lambda function, **kwargs: None
    _answer_methods()


def _answer_methods() -> None:
    """Replaces tensor methods that need a driver, or that behave differently on fake tensors."""
    tensor: Any = torch.Tensor
    fake: Any = FakeTensor

    def tolist(self: Any) -> Any:
        """Copies to the host once, as on CUDA; fake tensors would be read number by number."""
        host = self.cpu()
        with unset_fake_temporarily():
            return host.constant.tolist()

    make = torch.tensor

    def through_the_host(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """Creates the tensor with a blocking copy, as on CUDA; on `meta` torch would not copy."""
        return make(data, **kwargs) if device is None else make(data, **kwargs).to(device)

    def pin_memory(self: Any) -> Any:
        """Returns the tensor itself if it is already pinned, like torch; here views of it are not marked as pinned."""
        if getattr(self, "pinned", False):
            return self
        copy = self.detach()
        copy.pinned = True
        return copy

    torch.tensor = through_the_host
    fake.tolist = tolist
    fake.is_cuda = property(_on_device)  # `meta` stands for CUDA too
    tensor.cuda = lambda self, device=None, non_blocking=False: self.to(current, non_blocking=non_blocking)
    tensor.pin_memory = pin_memory
    tensor.record_stream = lambda self, stream: None


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a model, with all tensors of its modules, to a device without storage; shared tensors stay shared."""
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
