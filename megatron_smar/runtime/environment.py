# SPDX-License-Identifier: Apache-2.0
"""What this process runs on: CUDA or the CPU, and which of NVIDIA's packages stand beside torch."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from typing import Literal

Device = Literal["cpu", "cuda"]
DEVICE_VARIABLE = "MEGATRON_SMAR_DEVICE"

# Megatron takes each of these wherever it can be imported, and none of them runs on a CPU.
GPU_PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


@dataclass(frozen=True)
class Environment:
    """The device and the packages that decide which kernels Megatron uses.

    Attributes:
        device: `cuda` or `cpu`.
        transformer_engine: Whether Transformer Engine is used.
        apex: Whether NVIDIA's apex is used (FusedAdam and the multi-tensor kernels).
        fused_weight_gradient: Whether apex's `fused_weight_gradient_mlp_cuda` is there, which adds weight gradients to
            the gradient buffer within their matrix product (--gradient-accumulation-fusion).
    """

    device: Device
    transformer_engine: bool = False
    apex: bool = False
    fused_weight_gradient: bool = False

    @property
    def fused_adam(self) -> bool:
        """Whether Megatron takes FusedAdam, from Transformer Engine or apex; it takes torch's AdamW otherwise."""
        return self.transformer_engine or self.apex


def detect_environment(wanted: Device | None = None) -> Environment:
    """The environment of this process; asked once, before Megatron is imported.

    Args:
        wanted: As for `detect_device`.

    Raises:
        RuntimeError: See `detect_device`; or a package of `GPU_PACKAGES` was imported already, on the CPU.
    """
    if detect_device(wanted) == "cpu":
        _hide_gpu_packages()
        return Environment("cpu")
    return Environment(
        "cuda", _is_installed("transformer_engine"), _is_installed("apex"), _is_installed(GPU_PACKAGES[-1])
    )


def detect_device(wanted: Device | None = None) -> Device:
    """The device of this process: MEGATRON_SMAR_DEVICE if set, else cuda where there is one, else cpu.

    On the CPU the machine's GPUs are hidden from this process and from those that it starts.

    Args:
        wanted: Overrides detection and, for a program that has no use for a GPU, the variable.

    Raises:
        RuntimeError: MEGATRON_SMAR_DEVICE is neither cpu nor cuda, or is cuda where torch can use no GPU; or the
            machine or its job has GPUs and torch can use none, which must not become a silent run on the CPU; or there
            are fewer GPUs than processes of this node.
    """
    chosen = wanted or os.environ.get(DEVICE_VARIABLE, "")
    if chosen not in ("", "cpu", "cuda"):
        raise RuntimeError(f"{DEVICE_VARIABLE} is {chosen!r}; set it to cpu or cuda, or unset it to detect the device.")
    if chosen == "cpu":
        _hide_gpus()
        return "cpu"
    import torch

    if torch.cuda.is_available():
        _check_local_rank(torch.cuda.device_count())
        return "cuda"
    if chosen == "cuda":
        raise RuntimeError(
            f"{DEVICE_VARIABLE} is cuda, but torch finds no CUDA device ({_why_no_cuda()}); set it to cpu or unset it."
        )
    expected = expected_gpus(os.environ, glob.glob("/dev/nvidia[0-9]*"))
    if expected:
        raise RuntimeError(
            f"GPUs are expected here ({expected}), but torch can use none ({_why_no_cuda()}): repair that, or set "
            f"{DEVICE_VARIABLE}=cpu to run on the CPU."
        )
    return "cpu"


def expected_gpus(variables: Mapping[str, str], device_files: list[str]) -> str | None:
    """What says that this process should have GPUs, or None; a user who hides them (CUDA_VISIBLE_DEVICES=) wants none.

    Args:
        variables: The environment's.
        device_files: The driver's files, one per GPU.
    """
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return None
    if visible:
        return f"CUDA_VISIBLE_DEVICES={visible}"
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if variables.get(name, "0") not in ("", "0"):
            return f"{name}={variables[name]}"
    return min(device_files, default=None)


def _why_no_cuda() -> str:
    """torch's own words for it."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda}: {str(error).strip().splitlines()[0]}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} counts 0 devices"


def _check_local_rank(gpus: int) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= gpus:
        raise RuntimeError(
            f"LOCAL_RANK is {local_rank}, but this process sees {gpus} GPU{'s' * (gpus > 1)}: start at most {gpus} per "
            f"node (torchrun --nproc-per-node {gpus}), or set {DEVICE_VARIABLE}=cpu to run on the CPU."
        )


def _hide_gpus() -> None:
    """With the GPUs visible, torch.cuda.is_available() would be true, and libraries would make contexts on them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raise RuntimeError(
            "torch counted the GPUs before megatron_smar.runtime.install() could hide them; import "
            "megatron_smar.runtime first, or start the program with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )


def _hide_gpu_packages() -> None:
    """Megatron would choose FusedAdam, Transformer Engine's layers and apex's kernels, which cannot run on a CPU."""
    for name in GPU_PACKAGES:
        if sys.modules.get(name) is not None:
            raise RuntimeError(
                f"{name} was imported before megatron_smar.runtime.install(), which hides it on the CPU; import "
                "megatron_smar.runtime first."
            )
        sys.modules[name] = None  # type: ignore[assignment]


def _is_installed(module: str) -> bool:
    """Whether it can be imported; megatron_smar.compatibility has refused halves of it."""
    return sys.modules.get(module) is not None or (module not in sys.modules and util.find_spec(module) is not None)
