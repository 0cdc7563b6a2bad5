# SPDX-License-Identifier: Apache-2.0
"""Runs pretrain_vlm.py on real shards: 50 steps in bf16, packs, resuming, changing the device, offloaded optimizer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.gpu.context import Context, Device, Findings
from tests.gpu.files import LOCAL, training_flags
from tests.gpu.programs import Program, read_json, run, run_together

Losses = dict[int, float]

BF16 = ["--bf16", "--use-distributed-optimizer"]
# Relative, for losses of later steps: rounding in earlier steps changes the weights, and Adam divides small gradients
# by themselves. The rounding of a single step is far smaller (see exactness.py).
SEVERAL_STEPS = 1e-3


def on_the_cpu(context: Context, findings: Findings) -> None:
    """The step `cpu-path`: hides the GPUs and runs the program like a user."""
    flags = [*training_flags(context.files), "--lr", "1e-3", "--train-iters", "3"]
    output = run(context, Program("cpu", ["pretrain_vlm.py", *flags], "cpu"))
    losses = [float(value) for value in re.findall(r"lm loss: (\S+)", output)]
    findings.finite("losses", losses)
    findings.require(len(losses) == 3, f"3 steps logged {len(losses)} losses")
    findings.note("losses", " ".join(f"{loss:.4f}" for loss in losses))


def bfloat16(context: Context, findings: Findings) -> None:
    """The step `bf16`: trains a model; checks its losses, and records its first save and its memory."""
    steps = 20 if context.quick else 50
    flags = [
        *BF16,
        "--lr",
        "1e-2",
        "--train-iters",
        steps,
        "--save",
        context.folder / "saved",
        "--save-interval",
        steps,
    ]
    (record,) = train(context, {"bf16": (flags, context.device)})
    losses = list(losses_of(record).values())
    findings.finite("losses", losses)
    findings.require(len(losses) == steps, f"{steps} steps logged {len(losses)} losses")
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    findings.note("first 5", round(first, 4))
    # The model memorizes plain colours. An untrained model's loss is the logarithm of its vocabulary, about 6.
    findings.at_most("last 5 / first 5", last / first, 0.9)
    findings.note("step ms", round(1e3 * statistics.median(step["seconds"] for step in _steps(record).values()), 1))
    findings.note("first step s", round(_steps(record)[1]["seconds"], 1))
    findings.note("first save s", round(record["saves"][0], 2))
    if context.device == "cuda":
        findings.note("peak MB", round(record["peak_bytes"] / 1e6, 1))


def packing(context: Context, findings: Findings) -> None:
    """The step `packing`: compares --packing-buffer-size on the device and on the CPU, in float32."""
    flags = "--micro-batch-size 1 --global-batch-size 2 --packing-buffer-size 20 --lr 1e-3 --train-iters 5".split()
    flags += ["--use-cpu-initialization", *LOCAL]
    device, cpu = map(losses_of, train(context, {"device": (flags, context.device), "cpu": (flags, "cpu")}))
    _compare(findings, "loss from the CPU's", device, cpu, SEVERAL_STEPS)


def resume(context: Context, findings: Findings) -> None:
    """The step `resume`: compares 10 uninterrupted steps with 5 + 5."""
    common = [*BF16, "--lr", "1e-2", "--train-iters", 10, "--save-interval", 5]
    folders = {name: ["--save", context.folder / f"saved-{name}"] for name in ("uninterrupted", "parts")}
    parts = [*folders["parts"], "--load", context.folder / "saved-parts"]
    full_run = ([*common, *folders["uninterrupted"]], context.device)
    stopped_run = ([*common, *parts, "--exit-interval", 5], context.device)
    full, first = map(losses_of, train(context, {"uninterrupted": full_run, "stopped": stopped_run}))
    (second,) = map(losses_of, train(context, {"resumed": ([*common, *parts], context.device)}))
    findings.require(sorted(first) == [1, 2, 3, 4, 5], f"the stopped run made steps {sorted(first)}")
    findings.require(sorted(second) == [6, 7, 8, 9, 10], f"the resumed run made steps {sorted(second)}")
    repeated = max(abs(first[step] - full[step]) for step in first)
    findings.note("same steps twice", repeated)
    # If the device repeats the same steps exactly, resuming must be exact too. It is not exact if a kernel sums with
    # atomic operations, in any order: the gradients of the embedding and of the vision tokens. The remaining difference
    # is then bf16's rounding (2^-9) of a few gradients, which grows over ten steps.
    tolerance = 0.0 if repeated == 0 else 1e-2
    findings.at_most("resumed", max(abs(second[step] - full[step]) for step in second), tolerance)


def moves(context: Context, findings: Findings) -> None:
    """The step `moves`: 6 steps on each device, and steps 4 to 6 again on the other device from the checkpoint at 3.

    Runs in float32.
    """
    common = ["--use-distributed-optimizer", "--lr", "1e-3", "--train-iters", 6, "--save-interval", 3]
    common += ["--use-cpu-initialization", *LOCAL]
    places: dict[str, Device] = {"device": context.device, "cpu": "cpu"}
    runs = {n: ([*common, "--save", context.folder / f"saved-{n}"], place) for n, place in places.items()}
    device, cpu = map(losses_of, train(context, runs))
    # Training skips the states of random generators of another device; without dropout no random numbers are used.
    load = {n: ["--load", context.folder / f"saved-{n}", "--ckpt-step", 3] for n in places}
    to_cpu, to_device = ([*common, *load["device"]], places["cpu"]), ([*common, *load["cpu"]], places["device"])
    on_cpu, on_device = map(losses_of, train(context, {"to-cpu": to_cpu, "to-device": to_device}))
    _compare(findings, "undisturbed, device and CPU", device, cpu, SEVERAL_STEPS)
    for name, resumed, undisturbed in (("GPU to CPU", on_cpu, device), ("CPU to GPU", on_device, cpu)):
        findings.require(sorted(resumed) == [4, 5, 6], f"{name}: resumed with steps {sorted(resumed)}")
        _compare(findings, name, resumed, {step: undisturbed[step] for step in resumed}, SEVERAL_STEPS)


def offload(context: Context, findings: Findings) -> None:
    """The step `offload`: the optimizer of the 8-GPU recipes, with its state in the host's memory."""
    offloaded = "--optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d".split()
    common = [*BF16, *offloaded, "--no-modality-router-bias", "--lr", "1e-2", "--train-iters", 10]
    common += ["--save-interval", 5, "--save", context.folder / "saved"]
    (full,) = map(losses_of, train(context, {"uninterrupted": (common, context.device)}))
    flags = [*common, "--load", context.folder / "saved", "--ckpt-step", 5]
    (resumed,) = map(losses_of, train(context, {"resumed": (flags, context.device)}))
    findings.finite("losses", list(full.values()))
    findings.require(sorted(resumed) == [6, 7, 8, 9, 10], f"the resumed run made steps {sorted(resumed)}")
    findings.at_most("last / first", full[10] / full[1], 0.95)
    # As in `resume`; here the copies between host and device also overlap with the steps.
    findings.at_most("resumed", max(abs(resumed[step] - full[step]) for step in resumed), 1e-2)


def train(context: Context, runs: Mapping[str, tuple[Sequence[Any], Device]]) -> list[dict[str, Any]]:
    """Runs pretrain_vlm.py with different flags at the same time, given as name -> (flags, device).

    Returns:
        The records of the runs, see watched.py.
    """
    programs = []
    for name, (flags, device) in runs.items():
        command = ["-m", "tests.gpu.watched", context.folder / f"{name}.json", *training_flags(context.files), *flags]
        programs.append(Program(name, command, device))
    run_together(context, programs)
    return [read_json(context.folder / f"{name}.json") for name in runs]


def _steps(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {int(step): values for step, values in record["steps"].items()}


def losses_of(record: dict[str, Any]) -> Losses:
    """Returns the language model's loss by step."""
    return {step: values["lm loss"] for step, values in _steps(record).items()}


def _compare(findings: Findings, name: str, found: Losses, expected: Losses, tolerance: float) -> None:
    """Compares the losses of the same steps."""
    findings.require(sorted(found) == sorted(expected), f"{name}: steps {sorted(found)} against {sorted(expected)}")
    findings.finite(f"{name}: losses", list(found.values()))
    common = found.keys() & expected.keys()
    findings.at_most(name, max((abs(found[step] - expected[step]) for step in common), default=0.0), tolerance)
