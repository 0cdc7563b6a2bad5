# SPDX-License-Identifier: Apache-2.0
"""Compares the device's memory with the counted bytes of weights, gradients and optimizer; also activations."""

from __future__ import annotations

from typing import Any

from tests.gpu.context import Context, Findings
from tests.gpu.overhead import MIXTRAL, build, fitting

MEGABYTE = 1e6


def parts(context: Context, findings: Findings) -> None:
    """The step `memory`."""
    shape = fitting(context, MIXTRAL)
    training = build(context, shape)
    _, _, model, optimizer, *_ = training.step.args
    training.use("smar")
    import torch

    parameters = [p for chunk in model for p in chunk.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    counted = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(_bytes(p.main_grad) for p in parameters if p.requires_grad),
    }
    findings.note("parameters M", round(trained / 1e6, 2))
    built = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    # All buffers exist in a second step; its peak is that of the activations, or of the optimizer's temporary copies.
    torch.cuda.reset_peak_memory_stats()
    training.step()
    torch.cuda.synchronize()
    counted["optimizer"] = optimizer_bytes(optimizer)
    for name, value in counted.items():
        findings.note(f"{name} MB", round(value / MEGABYTE, 1))
    if context.device == "cpu":
        findings.note("measured", "nothing on the CPU")
    else:
        _compare(findings, counted, built, after, torch.cuda.max_memory_allocated())
    # Weights take 2 bytes (bf16), gradients 4, main weights and moments 12; the biases and the batch add a little.
    findings.at_most("gradient bytes per parameter", counted["gradients"] / trained, 4.01)
    findings.at_most("optimizer bytes per parameter", counted["optimizer"] / trained, 12.1)


def _compare(findings: Findings, counted: dict[str, int], built: int, after: int, peak: int) -> None:
    """Compares with the allocator's values; it rounds to 512 bytes and keeps some workspaces."""
    findings.note("after building MB", round(built / MEGABYTE, 1))
    findings.note("after a step MB", round(after / MEGABYTE, 1))
    findings.note("peak of a step MB", round((peak - after) / MEGABYTE, 1))
    # cuBLAS keeps a workspace of 32 MB (8 MB before Hopper) for each of a few streams, Megatron small buffers.
    findings.at_most("after a step / counted", (after - 200e6) / sum(counted.values()), 1.05)
    # If the counted bytes are not allocated, they are not on the device, or nothing was measured. The float32 biases
    # are counted twice.
    findings.at_most("counted / after a step", sum(counted.values()) / max(after, 1), 1.01)


def optimizer_bytes(optimizer: Any) -> int:
    """Returns the bytes of float32 main weights and of the optimizer's state, each storage counted once."""
    storages: dict[int, int] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        tensors = [p for group in inner.param_groups for p in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if hasattr(value, "numel")]
        for tensor in tensors:
            storages[tensor.data_ptr()] = _bytes(tensor)
    return sum(storages.values())


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
