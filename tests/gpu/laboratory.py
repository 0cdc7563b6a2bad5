# SPDX-License-Identifier: Apache-2.0
"""Runs a few training steps on a given batch, on this process's device: `python -m tests.gpu.laboratory JOB.json`.

The job is {"batch", "output", "steps", "start", "flags"}. `output` gets the logged values of each step and, if there is
only one rank, the gradient of every parameter in the first step. `start` is a folder for a checkpoint of the weights
before the first step, or null.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.distributed import steps  # first: it prepares Megatron for the device

# isort: split
import torch
import torch.distributed as dist
from megatron.training import get_args
from megatron.training.checkpointing import save_checkpoint

from megatron_smar.training.setup import start
from tests.gpu.programs import read_json

# By torch's default, float32 convolutions (the tower's patches) are rounded to 10 bits on the GPU only.
torch.backends.cudnn.allow_tf32 = False


def gradients(model: list[Any]) -> dict[str, torch.Tensor]:
    """Returns the gradient of every trained parameter, after all of Megatron's reductions."""
    named = [item for chunk in model for item in chunk.module.named_parameters()]
    return {name: parameter.main_grad.detach().cpu().clone() for name, parameter in named if parameter.requires_grad}


def main() -> None:
    """Runs the job."""
    job = read_json(Path(sys.argv[1]))
    model, optimizer, scheduler = start([str(flag) for flag in job["flags"]])
    args, batch = get_args(), torch.load(job["batch"])
    if job["start"]:
        args.save = job["start"]
        save_checkpoint(1, model, optimizer, scheduler, 0)
    values, first = [], {}
    for iteration in range(job["steps"]):
        args.curr_iteration = iteration
        values.append(dict(steps.step(batch, iteration, model, optimizer, scheduler)))
        if iteration == 0 and steps.RANKS == 1:
            first = gradients(model)
    if steps.RANK == steps.RANKS - 1:  # the last pipeline stage has the loss
        torch.save({"values": values, "gradients": first}, job["output"])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
