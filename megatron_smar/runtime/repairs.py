# SPDX-License-Identifier: Apache-2.0
"""Repairs of Megatron that GPUs need: on every device, or on CUDA alone."""

from __future__ import annotations

import functools
import queue
from pathlib import Path
from typing import Any

import torch

from megatron_smar.runtime.adaptation import Where, adaptation


@adaptation(
    "the wheel has no Makefile for the dataset helpers, and brings them compiled; rank 0 exits, the others wait for it",
    Where.ANYWHERE,
)
def skip_compiling_helpers() -> None:
    """Megatron's indexed-dataset helper is compiled only where its sources and Makefile are (a source installation)."""
    import megatron.core.datasets.utils as utils

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


@adaptation(
    "each first save starts a process for a queue, and that imports everything again: ten seconds or more",
    Where.ANYWHERE,
)
def collect_results_of_a_save_in_the_process() -> None:
    """What a save's threads report goes through a plain queue, unless --async-save has another process write."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    from megatron.training import get_args

    get_shared_queue = filesystem.get_write_results_queue

    @functools.wraps(get_shared_queue)
    def get_queue(mp_mode: str = "spawn") -> Any:
        return get_shared_queue(mp_mode) if get_args().async_save else queue.Queue()

    filesystem.get_write_results_queue = get_queue


@adaptation(
    "NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: float32 routers, modality biases and the sums of the "
    "routing statistics would be rounded to 10 bits, as torch's default rounds float32 convolutions",
    Where.CUDA,
    needed_by="torch 2.11 to 2.13",
)
def keep_float32_products() -> None:
    """Products and convolutions of float32 are computed in float32; those of bf16 are not concerned."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@adaptation(
    "the offloaded optimizer pins its copies of the parameters before it converts them to float32, which unpins them: "
    "the way back to the GPU then blocks the host",
    Where.CUDA,
)
def pin_offloaded_parameters() -> None:
    """--optimizer-cpu-offload keeps the float32 parameters in pinned memory, as --pin-cpu-params says."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    split_parameters = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(split_parameters)
    def split_and_pin(self: Any, offload_fraction: float) -> Any:
        parts = split_parameters(self, offload_fraction)
        copies = parts[3]  # copy on the host -> parameter on the GPU
        for copy in copies if self.pin_cpu_params else ():
            copy.data = copy.data.pin_memory()
        return parts

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_and_pin


@adaptation(
    "Megatron's SFT and multimodal tokenizers do not say trust_remote_code=False, and transformers then asks on the "
    "terminal, where any input that begins with y runs a model folder's code",
    Where.ANYWHERE,
    needed_by="megatron-core 0.19.2, transformers 5",
)
def never_ask_to_run_a_models_code() -> None:
    """Who wants the code of a model's folder to be run says --trust-remote-code; there is no question."""
    import transformers.dynamic_module_utils as code

    code.TIME_OUT_REMOTE_CODE = 0


ADAPTATIONS = (
    skip_compiling_helpers,
    collect_results_of_a_save_in_the_process,
    keep_float32_products,
    pin_offloaded_parameters,
    never_ask_to_run_a_models_code,
)
