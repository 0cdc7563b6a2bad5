# SPDX-License-Identifier: Apache-2.0
"""Every layout gives the same result as one process with the full batch: losses, distances, all parameters' gradients.

The gradients are compared after all of Megatron's reductions: they are computed from the weights after one optimizer
step, read from the checkpoint that the layout saves. Everything is float64 except what Megatron forces into float32:
the router's softmax and the cross-entropy, whose last bits depend on the order of sums. `cases.py` has the layouts;
`make test-matrix` runs all of them and writes docs/exactness.md.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.batches import IMAGE, make_batch
from tests.distributed.cases import CASES, PLAIN, Case, Setting
from tests.distributed.laboratory import read_values, run_jobs
from tests.launch import ROOT, load_weights

Weights = dict[str, Tensor]
REFERENCE, WITHOUT_SMAR = Setting(), Setting(flags=PLAIN)
# Largest deviation of a gradient, as a share of the parameter's largest gradient: rounding of the float32 parts (6e-8
# each) over two layers. In float32 the subtraction of weights of size 1 also loses absolute accuracy (1.2e-7).
RELATIVE = {"float64": 5e-6, "float32": 2e-4, "bfloat16": 0.2}
ABSOLUTE = {"float64": 1e-9, "float32": 3e-7, "bfloat16": 4e-3}


@dataclass(frozen=True)
class Job:
    """One step of training, in a folder."""

    case: Case
    folder: Path
    loads: Path | None = None


class Laboratory:
    """Runs all jobs of the session, those with the same number of ranks in one program, and reads their results."""

    def __init__(self, folder: Path, cases: Sequence[Case]) -> None:
        from tests.models import build_hf_model

        self.folder = folder
        self.rows: dict[str, list[str]] = {case.name: ["did not run", ""] for case in cases}
        build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder / "vision")
        settings = dict.fromkeys([REFERENCE, WITHOUT_SMAR, *(case.reference or case.setting for case in cases)])
        single = [Job(Case("one process", 1, 1, "", s), folder / f"reference_{i}") for i, s in enumerate(settings)]
        self.references = {job.case.setting: job for job in single}
        self.jobs = {case.name: self._job(case, i) for i, case in enumerate(cases)}
        for ranks in (1, 2, 4):
            jobs = [self._described(job) for job in (*single, *self.jobs.values()) if job.case.ranks == ranks]
            run_jobs(jobs, ranks, folder / f"jobs_{ranks}.json")

    def _job(self, case: Case, number: int) -> Job:
        start = self.references[case.reference or case.setting].folder / "start"
        return Job(case, self.folder / f"case_{number}", start)

    def _described(self, job: Job) -> dict[str, Any]:
        batch = self.folder / f"{job.case.setting.batch}.pt"
        if not batch.exists():
            torch.save(make_batch(job.case.setting.batch), batch)
        start = ["--load", str(job.loads), "--finetune"] if job.loads else []
        return {
            "batches": [str(batch)],
            "folder": str(job.folder),
            "save_before": job.loads is None,
            "dtype": job.case.dtype,
            "flags": [*job.case.flags(), "--vision-model", str(self.folder / "vision"), *start],
        }

    def gradients(self, job: Job) -> tuple[Weights, dict[str, float]]:
        """Returns the gradient of every parameter (and the change of every buffer), and the logged values."""
        values = read_values(job.folder)[-1]
        before = load_weights((job.loads or job.folder / "start") / "iter_0000001")
        after = load_weights(job.folder / f"iter_{job.case.setting.steps:07d}")
        assert set(after) == set(before)
        steps = {n: before[n].double() - w.double() for n, w in after.items() if w.is_floating_point()}
        if job.case.adam:  # without moments Adam's step is u = g / (|g| + 1)
            steps = {name: u / (1 - u.abs()) for name, u in steps.items()}
        return steps, values


@pytest.fixture(scope="module")
def laboratory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    wanted = [item.callspec.params["name"] for item in request.session.items if "layout_equals" in item.name]
    laboratory = Laboratory(tmp_path_factory.mktemp("exactness"), [CASES[name] for name in wanted])
    yield laboratory
    table = os.environ.get("EXACTNESS_TABLE")
    if table and set(laboratory.rows) == set(CASES):
        write_table(ROOT / table, laboratory.rows)


LAYOUTS = [pytest.param(name, marks=[] if case.core else pytest.mark.matrix) for name, case in CASES.items()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process_with_the_whole_batch(laboratory: Laboratory, name: str) -> None:
    case, row = CASES[name], laboratory.rows[name]
    row[:] = "failed", "failed"
    expected, values = laboratory.gradients(laboratory.references[case.reference or case.setting])
    found, found_values = laboratory.gradients(laboratory.jobs[name])
    relative, absolute = RELATIVE[case.dtype], ABSOLUTE[case.dtype]
    worst = 0.0
    for parameter, gradient in expected.items():
        largest = float(gradient.abs().max())
        error = float((found[parameter] - gradient).abs().max())
        assert error <= relative * largest + absolute, f"{parameter}: off by {error:.3g} of {largest:.3g}"
        worst = max(worst, error / largest if largest > absolute / relative else 0.0)
    logged = {key: value for key, value in values.items() if "loss" in key or "mrd" in key}
    if not case.logs_its_loss:
        del logged["lm loss"]
    off = {key: abs(found_values[key] - value) / max(abs(value), 1e-3) for key, value in logged.items()}
    assert all(error <= max(10 * relative, 1e-6) for error in off.values()), (values, found_values)
    row[:] = f"{worst:.1e}", f"{max(off.values()):.1e}"


def test_the_reference_itself_has_smar_in_it(laboratory: Laboratory) -> None:
    """If this failed, the gradients could be equal because none of them has SMAR's part."""
    smar, values = laboratory.gradients(laboratory.references[REFERENCE])
    plain, _ = laboratory.gradients(laboratory.references[WITHOUT_SMAR])
    routers = [name for name in smar if "router" in name and "expert_bias" not in name]
    assert len(routers) == 2, "weight and modality bias; Megatron's checkpoint stacks the layers"
    for name in routers:
        assert (smar[name] - plain[name]).abs().max() > 1e-4, f"SMAR has no gradient in {name}"
    for name in smar:
        if name.startswith("vision_model"):
            assert smar[name].abs().max() == 0, f"{name} is frozen"
    assert smar["connector.linear_1.weight"].abs().max() > 1e-5
    assert values["moe/smar loss_layer_0"] > 0.1 and values["moe/smar loss_layer_1"] > 0.1


def test_each_of_three_modalities_has_a_bias_that_learns(laboratory: Laboratory) -> None:
    """If this failed, every layout could count the third modality as one of the other two."""
    (setting,) = {case.setting for case in CASES.values() if case.name == "three modalities, DP 2"}
    gradients, _ = laboratory.gradients(laboratory.references[setting])
    (bias,) = [gradient for name, gradient in gradients.items() if name.endswith("modality_bias.bias")]
    assert bias.shape[-2] == 3
    assert bias.abs().amax(dim=-1).min() > 1e-6


def write_table(path: Path, rows: dict[str, list[str]]) -> None:
    """Writes the result table of `make test-matrix`."""
    lines = [
        "# Exactness: every layout against one process",
        "",
        "Written by `make test-matrix` (tests/distributed/test_exactness.py; the layouts are in cases.py). One "
        "optimizer step of a small model (two for the strategies that keep state) through Megatron's `train_step` and "
        "this project's forward step, in float64 except for what Megatron forces into float32 (the router's softmax, "
        "the cross-entropy); interleaved layouts and the distributed optimizer are in float32. *Gradients*: the "
        "largest deviation of any parameter's gradient as a share of that parameter's largest; a layout passes if a "
        f"deviation is below {RELATIVE['float64']:g} of that (float32: {RELATIVE['float32']:g}, bfloat16: "
        f"{RELATIVE['bfloat16']:g}) plus {ABSOLUTE['float64']:g} ({ABSOLUTE['float32']:g}, {ABSOLUTE['bfloat16']:g}). "
        "*Values*: the largest relative deviation of the logged losses and distances, per layer. All ran on the CPU "
        "with Gloo, none on a GPU.",
        "",
        "| layout | gradients | values |",
        "|---|---|---|",
        *(f"| {name} | {gradients} | {values} |" for name, (gradients, values) in rows.items()),
        "",
        "## Training steps of the program",
        "",
        "`pretrain_vlm.py` on shards of images and texts, six steps with SMAR active and AdamW, in float32 "
        "(tests/functional/test_training.py): the largest absolute deviation of a logged value from one process.",
        "",
        "| layout | loss | MRD distance | gradient norm |",
        "|---|---|---|---|",  # its rows are added by that test
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
