# SPDX-License-Identifier: Apache-2.0
"""A device without storage: torch's fake tensors, with the host's waits for it counted and its reads answered.

An operation on tensors of two devices raises, as it does on CUDA, and so does one whose result has a size that only the
device knows. What a host reads of a device has no value here, so `Waits` gives one, and notes who asked. Tensors of the
host keep their values, as far as they are small.
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

current = torch.device("cpu")  # what torch.cuda.current_device() says
_counting: list[Waits] = []


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, while it lasts, by kind and by who does it: `read file:function`.

    - `read`: a value or tensor of the device comes to the host, now or by a copy that is waited for later;
    - `upload`: a copy to the device that is blocking, or from memory that is not pinned;
    - `wait`: for an event, a stream or the whole device.

    Args:
        mode: The fake tensors'.
        answer: Values for a tensor that is copied to the host, by its shape and type.
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
        if kind == "read" and func is _aten._to_copy.default:
            return self.known(lambda: self.answer(source.shape, source.dtype).to(source.dtype))
        made = source is None and "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
        return self.known(lambda: func(*args, **kwargs)) if made else func(*args, **kwargs)

    def known(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of the host with its values."""
        with unset_fake_temporarily():
            values = make()
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, values, make_constant=True)


def _kind(func: Any, args: Any, kwargs: Any) -> str | None:
    """How an operation makes the host wait, if it does."""
    if func is _aten._local_scalar_dense.default:
        return "read" if _on_device(args[0]) else None
    if func in _INDEXING:  # torch moves indices of the host by a blocking copy
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
    """The innermost function of Megatron or ours that is running."""
    frame: Any = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(_PACKAGES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}" if frame else "a test"


def _wait(*args: Any) -> None:
    if _counting:
        _counting[-1].by[f"wait {_who()}"] += 1


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of real tensors that makes a dataclass of them, which then are fake and keep their values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            made = function(*args, **kwargs)
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(made, **{name: _counting[-1].known(lambda v=v: v) for name, v in tensors.items()})

    return call


def stand_for_cuda() -> None:
    """What Megatron asks torch.cuda for, beside tensors: the current device, streams, events and generator states."""
    from megatron_smar.runtime import cpu_torch

    cpu_torch.provide_streams.__wrapped__()  # past the check of where it acts
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
    """The methods of a tensor that ask for a driver, or that fake tensors have otherwise."""
    tensor: Any = torch.Tensor
    fake: Any = FakeTensor

    def tolist(self: Any) -> Any:
        """One copy to the host, as on CUDA, where fake tensors would be read number by number."""
        host = self.cpu()
        with unset_fake_temporarily():
            return host.constant.tolist()

    make = torch.tensor

    def through_the_host(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """As on CUDA, by a blocking copy; on `meta` torch makes none."""
        return make(data, **kwargs) if device is None else make(data, **kwargs).to(device)

    def pin_memory(self: Any) -> Any:
        """The tensor itself if it is pinned already, as torch does; views of it do not know here that they are."""
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
