# SPDX-License-Identifier: Apache-2.0
"""pretrain_vlm.py with one fault: the environment's FAULT is kind, step, value and a part of a parameter's name.

The kinds: `weight` sets one number of the first parameter whose name has the given part, as the model is built;
`gradient` one number of its gradient, in the given step, on rank 0 alone, and `copy` on the last rank alone, whose copy
of a weight that is not split the gradient norm leaves out under tensor parallelism; `loss` adds the value to the losses
of the last rank, which leaves the gradient as it is.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_vlm  # isort: skip  (it adapts torch and Megatron before they are imported)
import torch
from megatron.training import get_args

KIND, STEP, VALUE, NAME = os.environ["FAULT"].split(",")


def in_step() -> bool:
    return get_args().curr_iteration + 1 == int(STEP)


def is_faulty_rank() -> bool:
    return torch.distributed.get_rank() == (0 if KIND == "gradient" else torch.distributed.get_world_size() - 1)


def faulty_model(*args, **kwargs):
    model = provide_model(*args, **kwargs)
    for name, parameter in model.named_parameters():
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if NAME not in name or KIND == "loss" or (KIND == "copy" and (is_split or not parameter.requires_grad)):
            continue
        if KIND == "weight":
            parameter.data.view(-1)[0] = float(VALUE)
        elif is_faulty_rank():
            parameter.register_hook(functools.partial(spoil, parameter))
        break
    return model


def spoil(parameter, gradient):
    if in_step():  # Megatron's layers add to main_grad themselves, and what a hook returns is ignored
        parameter.main_grad.view(-1)[0] = float(VALUE)


def build_faulty_step():
    forward = build_step()

    def faulty_step(iterator, model):
        output, loss = forward(iterator, model)
        faulty = KIND == "loss" and in_step() and is_faulty_rank()
        return output, (lambda losses: loss(losses + float(VALUE))) if faulty else loss

    return faulty_step


provide_model, build_step = pretrain_vlm.model_provider, pretrain_vlm.build_forward_step
pretrain_vlm.model_provider, pretrain_vlm.build_forward_step = faulty_model, build_faulty_step
pretrain_vlm.main()
