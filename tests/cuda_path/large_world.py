# SPDX-License-Identifier: Apache-2.0
"""Builds one rank of a recipe's full-size model in a world of 8 or 64, without storage, and writes its sizes.

    RANK=63 WORLD_SIZE=64 LOCAL_RANK=7 python tests/cuda_path/large_world.py RESULT FLAGS...

The process claims GPUs whose memory is torch's meta device, and a fake process group replaces the other ranks. Flags,
checks, model, gradient buffers and optimizer are this project's and Megatron's own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_smar.runtime import cpu_torch
from tests import redirected_cuda

META = torch.device("meta")


def claim_memoryless_gpus() -> None:
    """Claims GPUs like `claim_cuda`, with the meta device instead of the CPU."""
    cpu_torch.CPU = META
    tensor: Any = torch.Tensor
    tensor.cpu = tensor.clone  # a copy on the host, without storage as well
    redirected_cuda.claim_cuda()
    tensor.type = lambda self, dtype=None: self.to(dtype) if dtype else f"torch.cuda.{KINDS[self.dtype]}Tensor"
    module: Any = torch.nn.Module
    module.cuda = lambda self, device=None: self.to(META)


KINDS = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.int64: "Long", torch.bool: "Bool"}


def numbers(model: list[Any], optimizer: Any) -> dict[str, Any]:
    """Counts the elements of parameters by part, of buffers, of gradient buffers by kind, and of the optimizer."""
    parameters: Counter[str] = Counter()
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            parameters[kind(name)] += parameter.numel()
    buffers = sum(buffer.numel() for chunk in model for buffer in chunk.module.buffers())
    gradients: Counter[str] = Counter()
    for chunk in model:
        for name, held in (("dense", chunk.buffers), ("experts", chunk.expert_parallel_buffers)):
            for buffer in held:
                gradients[name] += buffer.grad_data.numel()
                gradients[f"{name} padding"] += buffer.numel - buffer.numel_unpadded
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    shards = [p for part in parts for group in part.param_groups for p in group["params"]]
    return {
        "parameters": parameters,
        "buffers": buffers,
        "gradients": gradients,
        "optimizer": sum(shard.numel() for shard in shards),
        "optimizers": sorted({type(part).__name__ for part in parts}),
        "dtypes": Counter(str(shard.dtype) for shard in shards),
        "devices": Counter(str(p.device) for chunk in model for p in chunk.parameters()),
    }


def kind(name: str) -> str:
    """Returns the part of the model to which a parameter is counted."""
    if "vision_model" in name or "connector" in name:
        return "vision" if "vision_model" in name else "connector"
    if ".experts." in name:
        return "experts"
    return "biases" if "modality_bias" in name else "rest"


def main() -> None:
    """Builds the rank and writes its sizes."""
    result, flags = Path(sys.argv[1]), sys.argv[2:]
    claim_memoryless_gpus()
    from megatron_smar import runtime

    runtime.install()
    redirected_cuda.stand_for_the_device_in_megatron()
    import megatron.training.training as training
    from megatron.core.timers import Timers

    from megatron_smar.checkpoint import fit
    from megatron_smar.checkpoint.start_point import StartPoint
    from megatron_smar.training import setup

    # The flags name a checkpoint, but it has no weights to compare or to load.
    setup.find_start = lambda args: StartPoint(args.load, args.finetune, {})
    setup.check_loadable = lambda args: None
    fit._folder, training.load_checkpoint = (lambda *args: None), (lambda *args, **kwargs: (0, 0))
    Timers.log = lambda *args, **kwargs: None  # times are gathered on the device
    with META:
        model, optimizer, _ = setup.start([*flags, "--fake-process-group"])
    result.write_text(json.dumps(numbers(model, optimizer)))


if __name__ == "__main__":
    main()
