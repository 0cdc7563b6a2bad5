# SPDX-License-Identifier: Apache-2.0
"""The steps in order: what each shows, its requirements and its time limit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.gpu.context import Context, Device, Findings

FILES = "files"

TRAINER = ("transformers", "megatron.core", "megatron.energon")
TRANSFORMER_ENGINE = (*TRAINER, "transformer_engine")
# Name of the package by the imported module, if they differ.
PACKAGES = {
    "megatron.core": "megatron-core",
    "megatron.energon": "megatron-energon",
    "transformer_engine": "transformer-engine",
}


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Name for `--only` and of the step's folder.
        shows: What the step shows if it passes.
        place: Module and function of this package, as `module:function`.
        limit: Seconds after which the step is stopped.
        modules: Modules that must be importable.
        needs_files: Whether the step reads the files made by the step `files`.
        needs_cuda: Whether the step can only run on a GPU.
        needs_packer: Whether the step packs samples, which needs the native packer.
        least_ranks: Minimum number of GPUs.
        alone: Whether no other step may run at the same time: it measures time, or later steps read its files.
    """

    name: str
    shows: str
    place: str
    limit: float
    modules: tuple[str, ...] = TRAINER
    needs_files: bool = False
    needs_cuda: bool = False
    needs_packer: bool = False
    least_ranks: int = 1
    alone: bool = False

    def missing(self, device: Device, ranks: int) -> str | None:
        """Returns the requirement that is missing here, or None."""
        absent = [PACKAGES.get(module, module) for module in self.modules if not _is_installed(module)]
        if absent:
            return " and ".join(absent)
        if self.needs_packer and not packer_is_built():
            return "the native packer (python setup.py build_ext --inplace)"
        if self.needs_cuda and device == "cpu":
            return "a GPU"
        if ranks < self.least_ranks:
            return f"--nproc {self.least_ranks} or more"
        return None


def function_at(place: str) -> Callable[[Context, Findings], None]:
    """Returns the function of a step, given its `place`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"tests.gpu.{module}"), name)


def _is_installed(module: str) -> bool:
    """Returns whether a module can be found; only its parents, which are namespaces, are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def packer_is_built() -> bool:
    """Returns whether the C++ packer of the data pipeline is built, next to its sources or in the installed package."""
    from tests.gpu.context import ROOT

    return any((ROOT / "megatron_smar" / "data").glob("_packing*.so"))


_ALL = (
    Step("environment", "driver, GPU and packages fit together", "environment:check", 60, (), alone=True),
    Step("compile", "torch.compile makes code for the device", "kernels:compile_function", 120, ()),
    Step("attention", "flash attention supports the model's shapes; float32's backend", "kernels:attention", 90, ()),
    Step("pixels", "images are normalized as on the CPU", "kernels:pixels", 60),
    Step("routing", "SMAR's equations and gradients, against float64", "kernels:routing", 60),
    Step(FILES, "images, shards, tokenizer, vision tower", "files:make", 60, alone=True),
    Step("bf16", "50 steps of pretrain_vlm.py: the loss falls", "training:bfloat16", 120, needs_files=True, alone=True),
    Step("cpu-path", "pretrain_vlm.py trains on the CPU of this machine", "training:on_the_cpu", 90, needs_files=True),
    Step("float32", "a training step equals the CPU's: losses, gradients", "exactness:rows", 90, needs_files=True),
    Step("resume", "a resumed run has an uninterrupted run's losses", "training:resume", 120, needs_files=True),
    Step("moves", "checkpoints move from the GPU to the CPU and back", "training:moves", 150, needs_files=True),
    Step(
        "packing",
        "--packing-buffer-size trains as on the CPU",
        "training:packing",
        90,
        needs_files=True,
        needs_packer=True,
    ),
    Step("packed", "packed sequences equal the CPU's", "exactness:packed", 90, needs_files=True),
    Step("latent", "multi-latent attention equals the CPU's", "exactness:latent_attention", 90, needs_files=True),
    Step("recompute", "full recomputation equals the CPU's", "exactness:recomputation", 90, needs_files=True),
    Step("grouped", "--moe-grouped-gemm equals the CPU's", "exactness:grouped_experts", 90, needs_files=True),
    Step(
        "te",
        "Transformer Engine's layers equal the local ones",
        "engine:layers",
        150,
        TRANSFORMER_ENGINE,
        needs_files=True,
        needs_cuda=True,
    ),
    Step(
        "fp8",
        "every FP8 recipe of the GPU trains",
        "engine:fp8",
        150,
        TRANSFORMER_ENGINE,
        needs_files=True,
        needs_cuda=True,
    ),
    Step(
        "offload",
        "the offloaded optimizer trains, saves, resumes",
        "training:offload",
        120,
        needs_files=True,
        needs_cuda=True,
    ),
    Step("tools", "import, evaluate, export, verify", "tools:round_trip", 180, needs_files=True),
    Step("waits", "no line of this project waits for the device", "waits:count", 90, needs_cuda=True),
    Step("smar-mixtral", "SMAR's cost at a layer of Mixtral's width", "overhead:mixtral", 120, alone=True),
    Step("smar-small", "SMAR's cost at a layer of 64 small experts", "overhead:small_experts", 120, alone=True),
    Step("speed", "tokens/s and MFU, compared with transformers", "speed:compare", 120, alone=True),
    Step("memory", "memory by part equals the counted bytes", "memory:parts", 90, alone=True),
    Step(
        "nccl",
        "every layout on several GPUs equals one GPU",
        "exactness:layouts",
        300,
        needs_files=True,
        least_ranks=2,
        alone=True,
    ),
)
STEPS = {step.name: step for step in _ALL}


def chosen(names: Sequence[str] | None, device: Device, ranks: int) -> list[Step]:
    """Returns the named steps in their order, with the step `files` if one of them needs it; all steps for None."""
    if names is None:
        return list(_ALL)
    wanted = set(names)
    if any(STEPS[name].needs_files and not STEPS[name].missing(device, ranks) for name in names):
        wanted.add(FILES)
    return [step for step in _ALL if step.name in wanted]
