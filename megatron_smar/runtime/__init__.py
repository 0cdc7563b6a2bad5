# SPDX-License-Identifier: Apache-2.0
"""CUDA or CPU + Gloo: the only package that knows which device is used and which GPU packages are installed.

`install()` adapts Megatron to the environment of this process, so that Megatron's own `pretrain()` runs in it. Each
adaptation is applied only where its reason holds: some make up for a missing GPU, the others fix faults that also occur
on CUDA. Call it before importing any part of Megatron; calling it again has no effect.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from megatron_smar.runtime import console, defaults, failure
from megatron_smar.runtime.adaptation import Adaptation, Where, adaptations
from megatron_smar.runtime.environment import Device, Environment, detect_device, detect_environment
from megatron_smar.runtime.private_folder import use_private_folder

__all__ = [
    "Adaptation",
    "Device",
    "Environment",
    "Where",
    "adaptations",
    "argument_defaults",
    "check_flags",
    "current",
    "describe",
    "device",
    "install",
    "install_or_exit",
]

_INSTALLED: list[Environment] = []


def install(wanted: Device | None = None) -> Device:
    """Adapts torch and Megatron to the environment of this process, once.

    Args:
        wanted: The device, for a program that runs on one device only; None to detect it (see `detect_device`). Ignored
            if the environment of this process was already installed.

    Returns:
        The device of this process.

    Raises:
        RuntimeError: See `detect_environment` and `private_folder`.
    """
    if not _INSTALLED:
        # Tensors on the host in pages of 2 MB: with 4 KB, the first write to a large one waits mostly for the kernel.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first tensor
        use_private_folder()
        _INSTALLED.append(detect_environment(wanted))
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it for tensor parallelism
        if _INSTALLED[0].device == "cuda" and "LOCAL_RANK" in os.environ:
            # Megatron queries the GPU's capability before it sets the device: all ranks would create contexts on GPU 0.
            import torch

            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        from megatron_smar.runtime import (
            asynchronous,
            cpu_megatron,
            cpu_torch,
            finite_steps,
            progress,
            repairs,
            saving,
            throughput,
            torch_adam,
        )

        parts = (cpu_torch, cpu_megatron, repairs, finite_steps, saving, asynchronous, progress, throughput, torch_adam)
        for part in parts:
            for adapt in part.ADAPTATIONS:
                adapt(_INSTALLED[0])
    return _INSTALLED[0].device


def install_or_exit(wanted: Device | None = None) -> Device:
    """Calls `install()` for a program: an unusable environment ends this rank with one sentence, not a traceback."""
    console.quiet_loggers()
    failure.explain_lost_connections()
    try:
        found = install(wanted)
        console.quiet_prints(current())
        return found
    except RuntimeError as error:
        failure.end(str(error))


def current() -> Environment:
    """Returns the environment that `install()` found.

    Raises:
        RuntimeError: `install()` has not been called.
    """
    if not _INSTALLED:
        raise RuntimeError("megatron_smar.runtime.install() has not been called; call it before importing Megatron.")
    return _INSTALLED[0]


def device() -> Device:
    """Returns the device of this process: the one `install()` found, or the one it would find."""
    return _INSTALLED[0].device if _INSTALLED else detect_device()


def argument_defaults() -> dict[str, Any]:
    """Returns the defaults of Megatron's flags that differ in this environment; flags given by the user win."""
    return defaults.defaults_of(current())


def describe() -> str:
    """Returns the environment and its defaults in one line."""
    return defaults.description(current())


def check_flags(args: Namespace) -> None:
    """Refuses flags that this environment does not support; see `defaults.check_flags`."""
    defaults.check_flags(args, current())
