# SPDX-License-Identifier: Apache-2.0
"""Cost of SMAR in a step: Megatron's router and this project's alternate on the same weights, timed by CUDA events."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable
from typing import Any

from tests.gpu.context import Context, Findings

SECONDS = 30.0  # time limit of the turns, reached on a slow GPU

# The benchmark's shapes: hidden, ffn, layers, sequence, micro-batch, vocabulary; and heads, groups, experts, top-k.
MIXTRAL: dict[str, Any] = dict(hidden=4096, ffn=14336, layers=1, seq_length=4096, micro_batch_size=1, vocabulary=512)
MIXTRAL |= dict(heads=32, groups=8, experts=8, top_k=2)
SMALL: dict[str, Any] = dict(hidden=2048, ffn=1024, layers=1, seq_length=4096, micro_batch_size=1, vocabulary=512)
SMALL |= dict(heads=16, groups=16, experts=64, top_k=8)
WAITS: dict[str, Any] = dict(hidden=256, ffn=512, layers=2, seq_length=256, micro_batch_size=2, vocabulary=512)
QUICK: dict[str, Any] = dict(hidden=64, ffn=128, seq_length=128, heads=4, groups=2)

BYTES_PER_PARAMETER = 18  # weight in bf16, gradient, main weight and two moments in float32


def mixtral(context: Context, findings: Findings) -> None:
    """The step `smar-mixtral`."""
    _measure(context, findings, MIXTRAL)


def small_experts(context: Context, findings: Findings) -> None:
    """The step `smar-small`."""
    _measure(context, findings, SMALL)


def fitting(context: Context, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the shape, with its widths halved until its state takes at most half of the GPU's memory."""
    if context.quick:
        return shape | QUICK
    import torch

    if context.device == "cpu":
        return shape | {"hidden": shape["hidden"] // 16, "ffn": shape["ffn"] // 16, "seq_length": 512}
    memory, shape = torch.cuda.get_device_properties(0).total_memory, dict(shape)
    while BYTES_PER_PARAMETER * parameters(shape) > memory / 2:
        shape |= {name: shape[name] // 2 for name in ("hidden", "ffn", "heads", "groups")}
    return shape


def parameters(shape: dict[str, Any]) -> int:
    """Returns the number of parameters of the layers' experts and attention."""
    experts = shape["experts"] * 3 * shape["hidden"] * shape["ffn"]
    return shape["layers"] * (experts + 4 * shape["hidden"] ** 2)


def build(context: Context, shape: dict[str, Any], extra: tuple[str, ...] = ()) -> Any:
    """Builds the benchmark's model on one rank, in bf16, with grouped experts if Transformer Engine is installed."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    from megatron_smar import runtime

    runtime.install()
    import importlib.util

    from benchmarks.routed_training import Shape, Training, save_vision_model

    sized = Shape(**shape, triples=0, quick_triples=0)
    if context.device == "cuda" and importlib.util.find_spec("transformer_engine"):
        extra = (*extra, "--moe-grouped-gemm")
    folder = str(context.folder / "vision")
    save_vision_model(folder)
    return Training(sized, 1, folder, bf16=True, extra=extra)


def device_seconds(training: Any, setting: str) -> float:
    """Returns the device's time for one step, in seconds."""
    import torch

    training.use(setting)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    training.step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _measure(context: Context, findings: Findings, shape: dict[str, Any]) -> None:
    from benchmarks.routed_training import BASE, STRATEGY
    from benchmarks.router_cost import percent_over, time_parts

    shape = fitting(context, shape)
    training = build(context, shape)
    times = _turns(training, *((1, 3) if context.quick else (10, 100)))
    overhead, quartiles = percent_over(times[STRATEGY], times[BASE])
    step = statistics.median(times[BASE])
    findings.note("layer", "{hidden} x {ffn}, {experts} experts, {seq_length} tokens".format(**shape))
    findings.note("step ms", round(1e3 * step, 2))
    findings.note("SMAR %", round(overhead, 2))
    findings.note("quartiles", "{:.2f} to {:.2f}".format(*quartiles))
    findings.note("steps", len(times[BASE]))
    findings.note("times", times)
    parts = time_parts(training, 2 if context.quick else 5)
    findings.note("exposed reduction %", round(100 * parts["exposed_wait"] / step, 3))
    findings.note("parts us", {name: round(1e6 * value / shape["layers"], 1) for name, value in parts.items()})
    findings.finite("times", [*times[BASE], *times[STRATEGY]])
    _count_kernels(context, findings, training)


def _turns(training: Any, warm_up: int, pairs: int) -> dict[str, list[float]]:
    """Returns the seconds of steps by setting; the order alternates, so that drift cancels."""
    from benchmarks.routed_training import BASE, STRATEGY

    settings = (BASE, STRATEGY)
    for _ in range(warm_up):
        for setting in settings:
            device_seconds(training, setting)
    times: dict[str, list[float]] = {setting: [] for setting in settings}
    end = time.monotonic() + SECONDS
    for pair in range(pairs):
        for setting in settings if pair % 2 == 0 else reversed(settings):
            times[setting].append(device_seconds(training, setting))
        if time.monotonic() > end and pair > 0:
            break
    return times


def _count_kernels(context: Context, findings: Findings, training: Any) -> None:
    """Counts what SMAR adds per layer: kernels and copies of the device; on the CPU, torch's dispatched operations."""
    from benchmarks.routed_training import BASE, STRATEGY

    layers = len(training.routers)
    if context.device == "cpu":
        from benchmarks.router_cost import count

        findings.note("operations per layer", count(training)[STRATEGY]["operations"])
        return
    kernels = {setting: profiled_kernels(training, setting) for setting in (BASE, STRATEGY)}
    for kind in ("kernels", "copies"):
        with_smar, without = kernels[STRATEGY][kind], kernels[BASE][kind]
        findings.note(f"{kind} of a step", without)
        findings.note(f"{kind} per layer", (with_smar - without) / layers)
    seen = kernels[BASE]["kernels"] > 0
    findings.require(seen, "the profiler saw no kernel: may this user read the card's counters?")


def profiled_kernels(training: Any, setting: str) -> dict[str, int]:
    """Counts the kernels and copies of one step with torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    device_seconds(training, setting)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        training.step()
        torch.cuda.synchronize()
    return count_on_device(profiler.events())


def count_on_device(events: Iterable[Any]) -> dict[str, int]:
    """Counts the kernels and copies among a profile's events.

    User annotations are on the device's track too. Their names cannot be distinguished from kernels': names of torch's
    elementwise kernels contain a lambda's number, as in `{lambda(float)#1}`.
    """
    from torch.autograd import DeviceType

    names = [e.name for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}
