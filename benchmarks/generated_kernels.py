# SPDX-License-Identifier: Apache-2.0
"""Counts the kernels in the code that torch.compile generates for CUDA, on a machine without a GPU."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from multiprocessing import get_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Never
from unittest.mock import patch

if TYPE_CHECKING:
    from megatron_smar.routing.fusion import FusedFunction

# Of an H100. Inductor reads them to divide large reductions; the functions that are counted have small ones.
DEVICE = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
LAUNCH = re.compile(r"^\s+(?:\w+ = )?(triton_\w+|extern_kernels\.\w+?)(?:\.run)?\(", re.MULTILINE)
_KERNELS: dict[tuple[str, str, tuple[Any, ...]], tuple[str, ...]] = {}  # by module, function and form of arguments


class _GeneratedError(Exception):
    """Ends a compilation when its code exists, which only a GPU could run."""


@contextmanager
def _pretended_device() -> Iterator[None]:
    """Answers what Inductor asks the driver while it generates code."""
    answers: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *_: (DEVICE.major, DEVICE.minor),
        "torch.cuda._get_device_properties": lambda _: DEVICE,
        "torch.utils._triton.has_triton": lambda: True,
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda: "",
        "torch._inductor.utils.log.warning": lambda *_: None,  # about the folder of a compilation that did not end
    }
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder))
        for name, answer in answers.items():
            stack.enter_context(patch(name, answer, create=True))
        yield


def _generated_code(module: str, name: str, arguments: Sequence[Any]) -> str:
    """Returns the code for a function of a module; a tensor among the arguments is its shape, strides and type."""
    import torch
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode

    function: FusedFunction[Any] = getattr(import_module(module), name)
    codes = []

    def end(graph: GraphLowering) -> Never:
        codes.append(graph.codegen()[0].value)
        raise _GeneratedError

    replaced = patch.object(GraphLowering, "_compile_to_module", end)
    with _pretended_device(), FakeTensorMode(), replaced, config.patch(force_disable_caches=True):
        given = [
            torch.empty_strided(each.shape, each.strides, dtype=getattr(torch, each.dtype), device="cuda")
            if isinstance(each, _TensorForm)
            else each
            for each in arguments
        ]
        try:
            torch.compile(function.function, fullgraph=True)(*given)
        except Exception as error:
            if not codes:
                raise RuntimeError(f"torch.compile generates no code for {name}: {error}") from error
    return codes[0]


def generated_kernels(calls: Mapping[FusedFunction[Any], Sequence[Any]]) -> dict[FusedFunction[Any], tuple[str, ...]]:
    """Returns the kernels that each function's compiled code launches for arguments like these, in their order.

    The code is generated in another process, since on the CPU the runtime of this one redirects CUDA to it.

    Args:
        calls: Arguments by function; the tensors may be on any device.

    Raises:
        RuntimeError: torch.compile divides a function at a graph break, or cannot compile it.
    """
    forms = {
        function: (function.__module__, function.__name__, tuple(_form(arg) for arg in args))
        for function, args in calls.items()
    }
    new = sorted(set(forms.values()) - _KERNELS.keys(), key=str)
    if new:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            codes = pool.map(_generated_code, *zip(*new, strict=True))
            _KERNELS.update(zip(new, (tuple(LAUNCH.findall(code)) for code in codes), strict=True))
    return {function: _KERNELS[form] for function, form in forms.items()}


class _TensorForm(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def _form(arg: Any) -> Any:
    if not hasattr(arg, "stride"):
        return arg
    return _TensorForm(tuple(arg.shape), arg.stride(), str(arg.dtype).removeprefix("torch."))
