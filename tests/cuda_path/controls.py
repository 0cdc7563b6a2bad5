# SPDX-License-Identifier: Apache-2.0
"""Faults that `storage_less` must detect in a model: every way in which a host waits, and every mix of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SIZE = 6


def of(model: Any, device: torch.device) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields the name and the function of each control; the last ones put a fault in the middle of the model."""
    from tests.cuda_path.parts import batch, model_loss

    def x() -> Tensor:
        return torch.ones(SIZE, device=device)

    def doing(act: Callable[[], Any]) -> Callable[[], Tensor]:
        return lambda: (act(), x())[1]

    def within(change: Callable[[Tensor], Tensor]) -> Tensor:
        """Computes the model's loss with a change to the connector's output."""
        handle = model.train().connector.register_forward_hook(lambda module, args, output: change(output))
        try:
            return model_loss(model, batch())
        finally:
            handle.remove()

    yield "work on the device", doing(lambda: (x() * 2 + torch.tensor(1.0)).sum())
    yield "a number", doing(lambda: x().sum().item())
    yield "a decision", doing(lambda: bool(x().isnan().any()))
    yield "a list", doing(lambda: x().tolist())
    yield "a copy to the host", doing(lambda: x().cpu())
    yield "an asynchronous copy to the host", doing(lambda: x().to("cpu", non_blocking=True))
    yield "a copy into a tensor of the host", doing(lambda: torch.zeros(SIZE).copy_(x()))
    yield "numbers made into a tensor", doing(lambda: torch.tensor([1.0, 2.0], device=device))
    yield "a copy from pageable memory", doing(lambda: torch.zeros(SIZE).cuda(non_blocking=True))
    yield "a blocking copy from pinned memory", doing(lambda: torch.zeros(SIZE).pin_memory().cuda())
    yield (
        "a copy from pinned memory",
        doing(lambda: torch.zeros(SIZE).pin_memory().pin_memory().cuda(non_blocking=True)),
    )
    yield "a pageable copy into a tensor of the device", doing(lambda: x().copy_(torch.zeros(SIZE), non_blocking=True))
    yield "indices of the host", doing(lambda: x()[torch.tensor([0, 1])])
    yield "an event", doing(lambda: torch.cuda.current_stream().record_event().synchronize())
    yield "the device", doing(torch.cuda.synchronize)
    yield "a size that the device knows", doing(lambda: x().nonzero())
    yield "a choice by a mask", doing(lambda: x()[x() > 0])
    yield "a tensor of the host", doing(lambda: x() + torch.ones(SIZE))
    yield "a tensor of the host within the model", lambda: within(lambda output: output + torch.ones(output.shape[-1]))
    yield "a number read within the model", lambda: within(lambda output: output * output.sum().item())
