# SPDX-License-Identifier: Apache-2.0
"""CUDA or CPU + Gloo: the only package that knows which one is running.

With CUDA nothing is touched. Without it, `install()` adapts Megatron so that its own `pretrain()` runs on the CPU. Call
it before anything of Megatron is imported; calling it again is harmless.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from megatron_smar.runtime.adaptation import Adaptation, adaptations

Device = Literal["cpu", "cuda"]
DEVICE_VARIABLE = "MEGATRON_SMAR_DEVICE"

__all__ = ["Adaptation", "adaptations", "argument_defaults", "device", "install"]


def device() -> Device:
    """The device of this process: MEGATRON_SMAR_DEVICE if set, else cuda where there is one, else cpu.

    Raises:
        RuntimeError: MEGATRON_SMAR_DEVICE is neither cpu nor cuda, or is cuda on a machine without CUDA.
    """
    import torch

    available = torch.cuda.is_available()
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise RuntimeError(f"{DEVICE_VARIABLE} is {wanted!r}; set it to cpu or cuda, or unset it to detect the device.")
    if wanted == "cuda" and not available:
        raise RuntimeError(f"{DEVICE_VARIABLE} is cuda, but torch finds no CUDA device; set it to cpu or unset it.")
    if wanted:
        return "cpu" if wanted == "cpu" else "cuda"
    return "cuda" if available else "cpu"


def install() -> Device:
    """Adapts torch and Megatron to the device of this process, once.

    Returns:
        The device.

    Raises:
        RuntimeError: See `device`; or Megatron was imported first, on a CPU with a Transformer Engine installed.
    """
    chosen = device()
    if chosen == "cpu":
        _hide_transformer_engine()
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it for sequence parallelism
        from megatron_smar.runtime import cpu_megatron, cpu_torch

        for adapt in (*cpu_torch.ADAPTATIONS, *cpu_megatron.ADAPTATIONS):
            adapt()
    return chosen


def argument_defaults() -> dict[str, Any]:
    """Defaults of Megatron's flags that differ on this device (none on CUDA); flags given by the user win."""
    if device() == "cuda":
        return {}
    return {
        "distributed_backend": "gloo",
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
        "async_tensor_model_parallel_allreduce": False,
    }


def _hide_transformer_engine() -> None:
    """A healthy Transformer Engine makes Megatron choose FusedAdam and TE layers, which cannot run on a CPU."""
    if sys.modules.get("transformer_engine") is None:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    else:
        raise RuntimeError(
            "Transformer Engine was imported before megatron_smar.runtime.install() on a machine without CUDA; "
            "import megatron_smar.runtime first."
        )
