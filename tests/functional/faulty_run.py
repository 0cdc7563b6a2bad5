# SPDX-License-Identifier: Apache-2.0
"""Runs pretrain_vlm.py with one fault, which FAULT in the environment defines: kind, steps, value, parameter name.

The fault is in the first parameter whose name contains the given one. The kinds are:

- `weight` sets one element of the parameter when the model is built;
- `gradient` sets one element of its gradient in the given step, only on rank 0;
- `copy` does so only on the last rank, for a parameter that is not sharded: under tensor parallelism the gradient norm
  leaves out that rank's copy;
- `loss` adds the value to the losses of the last rank, which leaves the gradient unchanged;
- `unapplied` leaves out the optimizer's step in the given steps, whose losses and gradients are finite.

Several steps are joined by `+`. WINDOW in the environment is the number of steps that a loss spike is compared with.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_vlm  # isort: skip  (it adapts torch and Megatron before they are imported)
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import get_args

from megatron_smar.reliability import loss_spikes

KIND, STEPS, VALUE, NAME = os.environ["FAULT"].split(",")
loss_spikes.WINDOW = int(os.environ.get("WINDOW", loss_spikes.WINDOW))


def in_step() -> bool:
    return str(get_args().curr_iteration + 1) in STEPS.split("+")


def is_faulty_rank() -> bool:
    return torch.distributed.get_rank() == (0 if KIND == "gradient" else torch.distributed.get_world_size() - 1)


def faulty_model(*args, **kwargs):
    model = provide_model(*args, **kwargs)
    if KIND in ("loss", "unapplied"):
        return model
    for name, parameter in model.named_parameters():
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if (
            NAME not in name
            or KIND in ("loss", "unapplied")
            or (KIND == "copy" and (is_split or not parameter.requires_grad))
        ):
            continue
        if KIND == "weight":
            parameter.data.view(-1)[0] = float(VALUE)
        elif is_faulty_rank():
            parameter.register_hook(functools.partial(spoil, parameter))
        break
    return model


def spoil(parameter, gradient):
    if in_step():  # Megatron's layers add to main_grad themselves; the hook's return value is ignored
        parameter.main_grad.view(-1)[0] = float(VALUE)


def build_faulty_step():
    forward = build_step()

    def faulty_step(iterator, model):
        output, loss = forward(iterator, model)
        faulty = KIND == "loss" and in_step() and is_faulty_rank()
        return output, (lambda losses: loss(losses + float(VALUE))) if faulty else loss

    return faulty_step


def step_or_not(optimizer):
    return (False, None, None) if KIND == "unapplied" and in_step() else step(optimizer)


step, ChainedOptimizer.step = ChainedOptimizer.step, step_or_not
provide_model, build_step = pretrain_vlm.model_provider, pretrain_vlm.build_forward_step
pretrain_vlm.model_provider, pretrain_vlm.build_forward_step = faulty_model, build_faulty_step
pretrain_vlm.main()
