# SPDX-License-Identifier: Apache-2.0
"""What this process runs on: CUDA or the CPU, and which of NVIDIA's packages are installed."""

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

# Megatron uses each of these wherever it can be imported, and none of them runs on a CPU.
GPU_PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


@dataclass(frozen=True)
class Environment:
    """The device and the packages that decide which kernels Megatron uses.

    Attributes:
        device: `cuda` or `cpu`.
        transformer_engine: Whether Transformer Engine is used.
        apex: Whether NVIDIA's apex is used (FusedAdam and the multi-tensor kernels).
        fused_weight_gradient: Whether apex's `fused_weight_gradient_mlp_cuda` is installed. Its kernel accumulates the
            weight gradient into the gradient buffer as part of the matrix product (--gradient-accumulation-fusion).
    """

    device: Device
    transformer_engine: bool = False
    apex: bool = False
    fused_weight_gradient: bool = False

    @property
    def fused_adam(self) -> bool:
        """Whether Megatron uses FusedAdam, from Transformer Engine or apex; otherwise it uses torch's AdamW."""
        return self.transformer_engine or self.apex


def detect_environment(wanted: Device | None = None) -> Environment:
    """Detects the environment of this process; called once, before Megatron is imported.

    Args:
        wanted: The device to use; see `detect_device`.

    Raises:
        RuntimeError: See `detect_device`; or the device is the CPU and one of `GPU_PACKAGES` was already imported.
    """
    if detect_device(wanted) == "cpu":
        _hide_gpu_packages()
        return Environment("cpu")
    return Environment(
        "cuda", _is_installed("transformer_engine"), _is_installed("apex"), _is_installed(GPU_PACKAGES[-1])
    )


def detect_device(wanted: Device | None = None) -> Device:
    """Returns the device of this process: MEGATRON_SMAR_DEVICE if set, else cuda if there is a GPU, else cpu.

    If the device is the CPU, the machine's GPUs are hidden from this process and its child processes.

    Args:
        wanted: The device to use, whatever MEGATRON_SMAR_DEVICE and the machine say, for a program that runs on one
            device only.

    Raises:
        RuntimeError: MEGATRON_SMAR_DEVICE is neither cpu nor cuda; or it is cuda and torch cannot use a GPU; or the
            machine or its job has GPUs and torch cannot use any, which must not silently become a run on the CPU; or
            this node has fewer GPUs than processes.
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
    """Returns the evidence that this process should have GPUs, such as `SLURM_JOB_GPUS=0,1`, or None if there is none.

    A user who hides the GPUs (CUDA_VISIBLE_DEVICES=) expects none.

    Args:
        variables: The environment variables.
        device_files: Paths of the driver's device files, one per GPU.
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
    """Returns torch's own explanation of why it finds no CUDA device."""
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


_visible: list[str | None] = []  # CUDA_VISIBLE_DEVICES before the GPUs were hidden


def environment_with_gpus() -> dict[str, str]:
    """Returns the environment for a program that may use the GPUs which this process has hidden from itself."""
    environment = dict(os.environ)
    for value in _visible:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment |= {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    return environment


def _hide_gpus() -> None:
    """Hides the GPUs: otherwise torch.cuda.is_available() is true, and libraries create contexts on them."""
    if not _visible:
        _visible.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raise RuntimeError(
            "torch counted the GPUs before megatron_smar.runtime.install() could hide them; import "
            "megatron_smar.runtime first, or start the program with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )


def _hide_gpu_packages() -> None:
    """Hides `GPU_PACKAGES`: Megatron would choose their optimizers, layers and kernels, which cannot run on a CPU."""
    for name in GPU_PACKAGES:
        if sys.modules.get(name) is not None:
            raise RuntimeError(
                f"{name} was imported before megatron_smar.runtime.install(), which hides it on the CPU; import "
                "megatron_smar.runtime first."
            )
        sys.modules[name] = None  # type: ignore[assignment]


def _is_installed(module: str) -> bool:
    """Returns whether a module can be imported; `compatibility` has already refused incomplete installations."""
    return sys.modules.get(module) is not None or (module not in sys.modules and util.find_spec(module) is not None)
