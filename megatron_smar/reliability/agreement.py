# SPDX-License-Identifier: Apache-2.0
"""What all ranks have to know of what happened on one of them."""

from __future__ import annotations

import socket

import torch


def first_problem(sentence: str) -> str:
    """Returns the first problem that any rank has, the same on all ranks; "" if none has one.

    Args:
        sentence: This rank's problem; "" for none.
    """
    if not torch.distributed.is_initialized():
        return sentence
    own = f"{sentence} (rank {torch.distributed.get_rank()} on {socket.gethostname()})" if sentence else ""
    return next(filter(None, problems_of_all(own)), "")


def problems_of_all(sentence: str) -> list[str]:
    """Returns every rank's sentence, in the order of the ranks, on all ranks."""
    if not torch.distributed.is_initialized():
        return [sentence]
    found = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, sentence)
    return found


def is_first_rank() -> bool:
    """Returns whether this is rank 0."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
