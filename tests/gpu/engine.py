# SPDX-License-Identifier: Apache-2.0
"""Compares Transformer Engine's layers with the local ones from the same checkpoint, and tests its FP8 recipes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tests.gpu.batches import ROWS
from tests.gpu.context import Context, Findings
from tests.gpu.exactness import Job, compare_values, run_jobs, start_of
from tests.gpu.files import LOCAL
from tests.gpu.programs import ProgramError

ENGINE = ("--transformer-impl", "transformer_engine")
# Widths divisible by the block sizes of every recipe.
WIDE = "--hidden-size 256 --ffn-hidden-size 512".split()
# Compute capability from which a recipe runs, and below which it runs. Blockwise scaling is for Hopper only.
RECIPES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "delayed": ((8, 9), (99, 0)),
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (10, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}


def layers(context: Context, findings: Findings) -> None:
    """The step `te`: rows and packs, with and without grouped experts; in bf16, as in training."""
    for packed in (False, True):
        rows = 1 if packed else ROWS
        kind = "packs" if packed else "rows"
        job = Job(f"local-{kind}", context.device, [*LOCAL, "--bf16"], packed, rows, start=True)
        (expected,) = run_jobs(context, [job])
        load = ["--bf16", *ENGINE, "--load", start_of(context, job), "--finetune"]
        names = {f"te-{kind}": load, f"te-{kind}-grouped": [*load, "--moe-grouped-gemm"]}
        jobs = [Job(name, context.device, flags, packed, rows) for name, flags in names.items()]
        for name, found in zip(names, run_jobs(context, jobs), strict=True):
            # Both round activations and weights to 2^-9 in each of about ten products, at different places; a token
            # whose second and third expert have almost equal scores may be routed to the other.
            compare_values(findings, name, found["values"], expected["values"], 3e-2, 5e-2)
            compare_directions(findings, name, found["gradients"], expected["gradients"])


def compare_directions(
    findings: Findings, name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Compares all gradients as one vector: its length, and its values for parameters with the same name in both."""
    lengths = [float(_vector(gradients, gradients).norm()) for gradients in (found, expected)]
    findings.at_most(f"{name}, gradient length", abs(lengths[0] / lengths[1] - 1), 5e-2)
    common = sorted(key for key in found.keys() & expected.keys() if found[key].shape == expected[key].shape)
    findings.require(len(common) > 0, f"{name}: no parameter has the same name and shape")
    ours, theirs = (_vector(gradients, common) for gradients in (found, expected))
    findings.note(f"{name}, parameters alike", len(common))
    # One in a hundred tokens is routed to another expert, and each gradient is rounded in every layer.
    findings.at_most(f"{name}, gradients", float((ours - theirs).norm() / theirs.norm()), 0.2)


def _vector(gradients: dict[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    return torch.cat([gradients[name].double().flatten() for name in names])


def fp8(context: Context, findings: Findings) -> None:
    """The step `fp8`: compares every recipe that the GPU supports with bf16 from the same weights."""
    capability = torch.cuda.get_device_capability()
    able = [name for name, (least, below) in RECIPES.items() if least <= capability < below]
    findings.note("recipes of the card", ", ".join(able) or "none")
    job = Job("bf16", context.device, [*WIDE, *ENGINE, "--bf16", "--moe-grouped-gemm"], start=True)
    (expected,) = run_jobs(context, [job])
    for recipe in able:
        flags = [*job.flags, "--load", start_of(context, job), "--finetune", "--fp8-format", "hybrid"]
        try:
            (found,) = run_jobs(context, [Job(recipe, context.device, [*flags, "--fp8-recipe", recipe])])
        except ProgramError as error:  # continue with the other recipes
            findings.failures.append(f"{recipe}: {error}")
            continue
        loss = [values["lm loss"] for values in found["values"]]
        findings.finite(f"{recipe}: losses", loss)
        errors = [abs(x / y["lm loss"] - 1) for x, y in zip(loss, expected["values"], strict=True)]
        # E4M3 has 3 mantissa bits (rounding 2^-4); over about ten products, most of the errors average out.
        findings.at_most(f"{recipe}: loss from bf16's", max(errors), 5e-2)
