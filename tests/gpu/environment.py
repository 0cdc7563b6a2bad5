# SPDX-License-Identifier: Apache-2.0
"""Describes this machine (GPU, driver, torch and other packages), and checks that they fit together."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from tests.gpu.context import ROOT, Context, Device, Findings
from tests.gpu.plan import packer_is_built

VERSIONS = (
    *("torch", "triton", "transformers", "megatron-core", "megatron-energon", "transformer-engine", "apex", "numpy"),
    *("flash-attn", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"),
)
# Megatron chooses its kernels by these modules.
MODULES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
# Variables that change the rounding, the queues or the number of threads.
VARIABLES = (
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "TORCH_COMPILE_DISABLE", "MEGATRON_SMAR_DEVICE", "MEGATRON_SMAR_ALLOW_UNTESTED"),
)
_QUERY = ("name", "driver_version", "memory.total", "compute_cap", "power.limit", "clocks.max.sm")


def no_gpu(ranks: int = 1) -> str | None:
    """Returns why `ranks` GPUs cannot be used here, or None if they can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed for this Python"
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return None if count >= ranks else f"--nproc is {ranks}, and torch finds {count}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    cards = nvidia_smi()
    if not cards:
        return f"torch {torch.__version__} finds no device, and nvidia-smi lists none"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them all"
    driver = cards[0]["driver_version"]
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use the card with driver {driver}"


def nvidia_smi() -> list[dict[str, str]]:
    """Returns nvidia-smi's values of each GPU; empty if it is not installed or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_QUERY, row, strict=True)) for row in rows]


def describe(device: Device) -> dict[str, Any]:
    """Returns the environment for the report."""
    import torch

    gpu = device == "cuda"
    return {
        "device": device,
        "card": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "cards": nvidia_smi() if gpu else [],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
        "present": {name: _is_present(name) for name in MODULES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check(context: Context, findings: Findings) -> None:
    """The step `environment`."""
    import torch

    findings.note("torch", torch.__version__)
    findings.note("CUDA", torch.version.cuda)
    if context.device == "cuda":
        _check_card(findings)
    else:
        findings.note("card", "none, tried on the CPU")
    product = torch.full((64, 64), 2.0, device=context.device) @ torch.eye(64, device=context.device)
    findings.require(bool((product == 2).all()), "a product of two matrices is wrong")
    for name in MODULES:
        findings.note(name, "present" if _is_present(name) else "absent")
    findings.note("packer", "built" if packer_is_built() else "not built: run `python setup.py build_ext --inplace`")
    findings.require(
        os.environ.get("NVIDIA_TF32_OVERRIDE", "0") == "0",
        "NVIDIA_TF32_OVERRIDE rounds float32 products to 10 bits; unset it",
    )
    if importlib.util.find_spec("megatron"):
        import megatron_smar  # refuses half-installed packages with one sentence

        findings.note("megatron_smar", megatron_smar.__version__)


def _check_card(findings: Findings) -> None:
    """Records the GPU and its driver, and checks that torch is compiled for it."""
    import torch

    cards = nvidia_smi()
    findings.note("card", torch.cuda.get_device_name())
    findings.note("driver", cards[0]["driver_version"] if cards else "nvidia-smi is not there")
    findings.note("memory GB", round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1))
    major, minor = torch.cuda.get_device_capability()
    findings.note("capability", f"{major}.{minor}")
    # Code for sm_80 runs on all of 8.x; compute_80 is PTX, which is compiled for any later GPU when it is loaded.
    built = [(kind, number) for kind, _, number in (name.partition("_") for name in torch.cuda.get_arch_list())]
    numbers = [(kind, int(number.rstrip("abcdef"))) for kind, number in built]
    own = 10 * major + minor
    fits = any(n <= own and (kind == "compute" or n // 10 == major) for kind, n in numbers)
    findings.require(fits, f"torch is built for {torch.cuda.get_arch_list()}, and the card is sm_{own}")
    findings.require(major >= 8, f"the card has no bf16 (compute capability {major}.{minor}, needs 8.0)")


def _is_present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of the checkout, or None if this is not a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def described(device: Device) -> dict[str, Any]:
    """Runs `describe` in a separate process: this one must not create a CUDA context."""
    command = [sys.executable, "-m", "tests.gpu.environment", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the environment could not be read: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(describe("cuda" if sys.argv[1] == "cuda" else "cpu")))
