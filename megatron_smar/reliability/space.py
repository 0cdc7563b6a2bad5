# SPDX-License-Identifier: Apache-2.0
"""How much room a run's checkpoints need, compared with the disk before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.training import get_args

from megatron_smar.reliability.agreement import first_problem, is_first_rank
from megatron_smar.reliability.saving import SaveFailedError

_ADAM = 12  # bytes of a trained parameter's float32 copy and its two moments


def checkpoint_bytes(model: Iterable[torch.nn.Module], with_optimizer: bool) -> int:
    """Returns about how many bytes a checkpoint has, the same on all ranks.

    Args:
        model: The model's chunks on this rank.
        with_optimizer: Whether the optimizer's state is saved.
    """
    replicas = {
        True: parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        False: parallel_state.get_expert_data_parallel_world_size(),
    }
    own = 0.0
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        if param_is_not_tensor_parallel_duplicate(parameter):
            state = _ADAM if with_optimizer and parameter.requires_grad else 0
            is_dense = getattr(parameter, "allreduce", True)  # Megatron's mark of what is not an expert's
            own += parameter.numel() * (parameter.element_size() + state) / replicas[is_dense]
    total = torch.tensor([own], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total.item())


def check_room(model: Iterable[torch.nn.Module], folder: Path) -> None:
    """Refuses to train what could not be saved.

    Raises:
        SaveFailedError: The disk of --save has no room for one checkpoint; raised on all ranks.
    """
    needed, problem = checkpoint_bytes(model, not get_args().no_save_optim), ""
    if is_first_rank():
        place = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            problem = (
                f"--save {folder} has {free / 1e9:.3g} GB free, and a checkpoint of this run has about "
                f"{needed / 1e9:.3g} GB: make room, or give a folder on another disk"
            )
    if problem := first_problem(problem):
        raise SaveFailedError(f"{problem}.")
