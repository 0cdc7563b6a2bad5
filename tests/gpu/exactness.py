# SPDX-License-Identifier: Apache-2.0
"""A training step on the device against the same step on the CPU; layouts on several GPUs against one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu.batches import LENGTH, ROWS, VOCABULARY, make_batch
from tests.gpu.context import Context, Device, Findings
from tests.gpu.files import LOCAL, MODEL
from tests.gpu.programs import Program, run_together

# Both devices draw the same weights on the host; every layer's distance lies outside of the band: SMAR has a gradient.
COMMON = """
    --use-cpu-initialization --init-method-std 0.1 --tokenizer-type NullTokenizer --clip-grad 0 --weight-decay 0
    --lr 1e-3 --lr-decay-style constant --train-iters 10 --modality-routing smar --freeze vision --smar-coeff 0.5
    --smar-d-min 3 --smar-d-max 4 --smar-eps 1e-3 --no-save-optim
""".split()
# A switch cannot be taken back, and Megatron refuses latent attention with grouped queries.
_GROUPED_QUERIES = "--group-query-attention --num-query-groups 2"
LATENT_ATTENTION = """
    --multi-latent-attention --rope-type rope --qk-layernorm --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16
    --qk-pos-emb-head-dim 16 --v-head-dim 16
""".split()
RECOMPUTATION = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()

# Of the largest of a parameter's gradient. Both devices add up products of float32 (6e-8) in orders of their own, over
# at most 512 tokens and two layers; a fault of a kernel is off by far more.
GRADIENT = 2e-4
GRADIENT_FLOOR = 3e-7  # below it, a gradient is rounding and nothing else
# Losses and distances of the first step, relative; later ones carry the difference of the weights on.
FIRST_VALUES, LATER_VALUES = 1e-4, 1e-3

TP = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
# Layout -> (flags, replicas that share two GPUs).
LAYOUTS: dict[str, tuple[str, int]] = {
    "data parallel": ("", 2),
    "EP": ("--expert-model-parallel-size 2", 2),
    "TP + SP": (TP, 1),
    "CP": ("--context-parallel-size 2", 1),
    "PP": ("--pipeline-model-parallel-size 2", 1),
}


@dataclass(frozen=True)
class Job:
    """One run of laboratory.py.

    Attributes:
        flags: Beyond `MODEL` and `COMMON`.
        packed: Whether the batch is packed.
        rows: Micro-batch size.
        start: Whether to leave a checkpoint of the first weights.
    """

    name: str
    device: Device
    flags: Sequence[Any] = ()
    packed: bool = False
    rows: int = ROWS
    ranks: int = 1
    start: bool = False
    steps: int = 3


def rows(context: Context, findings: Findings) -> None:
    """The step `float32`."""
    _against_the_cpu(context, findings, [], [])


def packed(context: Context, findings: Findings) -> None:
    """The step `packed`."""
    _against_the_cpu(context, findings, [], [], packed=True)


def latent_attention(context: Context, findings: Findings) -> None:
    """The step `latent`."""
    _against_the_cpu(context, findings, LATENT_ATTENTION, LATENT_ATTENTION)


def recomputation(context: Context, findings: Findings) -> None:
    """The step `recompute`: against the CPU without it."""
    _against_the_cpu(context, findings, RECOMPUTATION, [])


def grouped_experts(context: Context, findings: Findings) -> None:
    """The step `grouped`: the flag is for GPUs; local layers ignore it, Transformer Engine's are in the step `te`."""
    _against_the_cpu(context, findings, ["--moe-grouped-gemm"] if context.device == "cuda" else [], [])


def layouts(context: Context, findings: Findings) -> None:
    """The step `nccl`: two GPUs in every layout, and all of them as replicas, against one."""
    ranks = context.ranks
    runs = {f"{name} 2": (flags, 2, replicas) for name, (flags, replicas) in LAYOUTS.items()}
    if ROWS % ranks == 0 and ranks > 2:
        runs[f"data parallel {ranks}"] = ("", ranks, ranks)
    reference = Job("alone", context.device, LOCAL, start=True)
    (alone,) = run_jobs(context, [reference])
    # From one checkpoint: every pipeline stage draws weights of its own.
    load = ["--load", start_of(context, reference), "--finetune"]
    for name, (flags, size, replicas) in runs.items():
        own = [*LOCAL, *load, *flags.split()]
        (found,) = run_jobs(
            context, [Job(name.replace(" ", "-"), context.device, own, rows=ROWS // replicas, ranks=size)]
        )
        compare_values(findings, name, found["values"], alone["values"], FIRST_VALUES, LATER_VALUES)


def _against_the_cpu(
    context: Context, findings: Findings, flags: list[str], cpu_flags: list[str], packed: bool = False
) -> None:
    """The same three steps on both, losses and distances of each, every gradient of the first."""
    size = 1 if packed else ROWS
    device = Job("device", context.device, [*LOCAL, *flags], packed, size)
    found, expected = run_jobs(context, [device, Job("cpu", "cpu", cpu_flags, packed, size)])
    compare_values(findings, "values", found["values"], expected["values"], FIRST_VALUES, LATER_VALUES)
    compare_gradients(findings, found["gradients"], expected["gradients"])
    learning = [name for name, gradient in expected["gradients"].items() if gradient.abs().max() > GRADIENT_FLOOR]
    for part in ("modality_bias", "experts", "connector"):
        findings.require(any(part in name for name in learning), f"no gradient reaches {part}")


def run_jobs(context: Context, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Runs jobs at the same time and returns what they leave: `values` by step, `gradients` by parameter."""
    run_together(context, [_program(context, job) for job in jobs])
    return [torch.load(context.folder / f"{job.name}.pt") for job in jobs]


def _program(context: Context, job: Job) -> Program:
    folder = context.folder
    batch = folder / f"batch-{'packs' if job.packed else 'rows'}.pt"
    length, total = (4 * LENGTH, ROWS // 4) if job.packed else (LENGTH, ROWS)
    if not batch.is_file():
        torch.save(make_batch(job.packed), batch)
    model = " ".join(MODEL)
    assert _GROUPED_QUERIES in model
    if "--multi-latent-attention" in job.flags:
        model = model.replace(_GROUPED_QUERIES, "")
    sizes = f"""
        --seq-length {length} --max-position-embeddings {length} --vocab-size {VOCABULARY}
        --micro-batch-size {job.rows} --global-batch-size {total}
    """.split()
    description = {
        "batch": str(batch),
        "output": str(folder / f"{job.name}.pt"),
        "steps": job.steps,
        "start": str(start_of(context, job)) if job.start else None,
        "flags": [
            *model.split(),
            *COMMON,
            *sizes,
            "--vision-model",
            str(context.files / "vision"),
            *map(str, job.flags),
        ],
    }
    path = folder / f"{job.name}.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    return Program(job.name, ["-m", "tests.gpu.laboratory", path], job.device, job.ranks)


def start_of(context: Context, job: Job) -> Path:
    """Where a job leaves its first weights."""
    return context.folder / f"start-{job.name}"


def compare_values(
    findings: Findings,
    name: str,
    found: list[dict[str, float]],
    expected: list[dict[str, float]],
    first: float,
    later: float,
) -> None:
    """Losses and distances step by step, relative to them (to 0.001 at least)."""
    errors = []
    for step, values in zip(found, expected, strict=True):
        wanted = {key: value for key, value in values.items() if "loss" in key or "mrd" in key}
        findings.finite(f"{name}: losses", [step[key] for key in wanted])
        errors.append(max(abs(step[key] - value) / max(abs(value), 1e-3) for key, value in wanted.items()))
    findings.at_most(f"{name}, first step", errors[0], first)
    findings.at_most(f"{name}, later steps", max(errors[1:]), later)


def compare_gradients(findings: Findings, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every parameter's gradient, as a share of its largest."""
    findings.require(found.keys() == expected.keys(), f"other parameters: {sorted(found.keys() ^ expected.keys())}")
    errors = {}
    for name in found.keys() & expected.keys():
        gradient = expected[name].double()
        error = float((found[name].double() - gradient).abs().max())
        errors[name] = error / (float(gradient.abs().max()) + GRADIENT_FLOOR / GRADIENT)
    worst = max(errors, key=lambda name: errors[name])
    findings.note("parameters", len(errors))
    findings.at_most("worst gradient", errors[worst], GRADIENT)
    findings.note("of", worst)
