# SPDX-License-Identifier: Apache-2.0
"""Tests of `make test-gpu` without a GPU: its error message, and its steps on the CPU, to test the program itself."""

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from tests.gpu.context import ROOT, Context, Findings
from tests.gpu.overhead import count_on_device
from tests.gpu.plan import STEPS, chosen
from tests.gpu.programs import Program, ProgramError, run
from tests.gpu.runner import Settings, run_steps
from tests.gpu.speed import peak_of
from tests.gpu.waits import is_ours, waits
from tests.launch import run as run_program

# sitecustomize of a step's processes: they claim a GPU, and what tests/redirected_cuda.py does not redirect stays on
# the CPU (`.to`, and the thread that pins batches). The mode that reports waits has no effect.
CLAIM = """
import os
if os.environ.get("MEGATRON_SMAR_DEVICE") == "cuda":
    import torch
    from tests import redirected_cuda
    redirected_cuda.claim_cuda(gpus=1)
    from megatron_smar import runtime
    from megatron_smar.runtime.cpu_torch import _on_cpu
    install = runtime.install
    def install_once(wanted=None):
        installed = bool(runtime._INSTALLED)
        device = install(wanted)
        if not installed:
            redirected_cuda.stand_for_the_device_in_megatron()
        return device
    def staying(move):
        on_cpu = lambda value: value if isinstance(value, bool) else _on_cpu(value)
        return lambda self, *args, **kwargs: move(self, *map(on_cpu, args), **kwargs)
    runtime.install = install_once
    torch.Tensor.to, torch.nn.Module.to = staying(torch.Tensor.to), staying(torch.nn.Module.to)
    torch.accelerator.set_device_index = torch.cuda.set_sync_debug_mode = lambda value: None
"""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_SMAR_DEVICE": ""}
# Packages that the steps must not need: they are for machines without a package index.
NOT_NEEDED = ("pytest", "hypothesis", "wandb", "moto", "mistral_common", "matplotlib", "tensorboard", "torchvision")


def first_hour(*options, **environment):
    """Runs the command without a GPU; a failed step does not raise."""
    return run_program("-m", "tests.gpu", *options, rank=NO_GPU | environment, check=False, timeout=1500)


def on_the_cpu(folder: Path, *options):
    """Runs the command with --device cpu; returns the process, and its report's steps by name."""
    done = first_hour("--device", "cpu", "--quick", "--json", folder / "report.json", *options)
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["device"] == "cpu"
    return done, {step["step"]: step for step in report["steps"]}


@pytest.mark.parametrize(("options", "status"), [((), 1), pytest.param(("--allow-none",), 0, marks=pytest.mark.matrix)])
def test_without_a_gpu_the_command_ends_with_one_sentence(options, status):
    done = first_hour(*options)
    assert done.returncode == status
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("There is no usable NVIDIA GPU here: torch "), (
        done.stdout
    )


def test_a_step_passes_or_fails_or_is_skipped_with_the_missing_package_named(tmp_path):
    only = ("--only", "environment", "routing", "te", "waits", "nccl")
    done, steps = on_the_cpu(tmp_path, *only, "--tolerance-factor", "1e-9")
    assert done.returncode == 1
    assert {name: (step["result"], step["reason"].partition(" is ")[0]) for name, step in steps.items()} == {
        "environment": ("passed", ""),
        "routing": ("FAILED", "float32 weight sums"),
        "te": ("skipped", "needs transformer-engine"),
        "waits": ("skipped", "needs a GPU"),
        "nccl": ("skipped", "needs --nproc 2 or more"),
    }
    assert "1 passed, 1 FAILED, 3 skipped" in done.stdout and "FAILED: routing" in done.stdout
    assert "proves nothing about a GPU" in done.stdout
    assert steps["routing"]["tolerances"].keys() <= steps["routing"]["figures"].keys()


def settings(folder: Path, seconds: float = 60.0) -> Settings:
    return Settings("cpu", True, 1, 1.0, folder, seconds)


@pytest.mark.matrix
def test_a_step_that_raises_or_hangs_fails_and_the_next_one_runs(tmp_path):
    """Runs a step without its function, a step with too little time for its imports, and an unchanged step."""
    broken, hanging = replace(STEPS["compile"], place="kernels:nothing"), replace(STEPS["pixels"], limit=0.01)
    rows = run_steps([broken, hanging, STEPS["routing"]], settings(tmp_path), lambda row, left: None)
    assert [row.result for row in rows] == ["FAILED", "FAILED", "passed"]
    assert "AttributeError" in rows[0].reason and "took longer than its 0 s" in rows[1].reason


def test_steps_after_a_failed_files_step_or_after_the_time_limit_fail_without_running(tmp_path):
    (tmp_path / "files").write_text("a file where the step makes its folder")
    with pytest.raises(OSError):
        run_steps([STEPS["files"]], settings(tmp_path), lambda row, left: None)
    rows = run_steps([STEPS["routing"]], settings(tmp_path, 0.0), lambda row, left: None)
    assert rows[0].result == "FAILED" and "are over" in rows[0].reason


def test_a_failed_program_is_reported_with_its_error_and_its_other_ranks_are_killed(tmp_path):
    context = Context("cpu", True, 1, 1.0, tmp_path, tmp_path)
    code = "import os, time; time.sleep(60 * (os.environ['RANK'] == '0')); raise ValueError('this rank fails')"
    begin = time.monotonic()
    with pytest.raises(ProgramError, match=r"ranks \(exit status 1\): ValueError: this rank fails"):
        run(context, Program("ranks", ["-c", code], "cpu", ranks=2))
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A1000", None),  # not an A100
        ("NVIDIA RTX A4000", None),  # not an A40
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_is_that_of_exactly_this_gpu_or_left_out(card, peak):
    assert peak_of(card) == peak


def test_kernels_are_counted_whatever_their_names_but_user_annotations_are_not():
    def event(name, device_type=DeviceType.CUDA, **more):
        return FunctionEvent(id=0, name=name, thread=0, start_us=0, end_us=1, device_type=device_type, **more)

    events = [
        event("void at::native::vectorized_elementwise_kernel<4, at::native::silu()::{lambda(float)#1}>"),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL"),
        event("Memcpy DtoH (Device -> Pinned)"),
        event("Memset (Device)"),
        event("Optimizer.step#AdamW.step", is_user_annotation=True),
        event("aten::silu", DeviceType.CPU),
    ]
    assert count_on_device(events) == {"kernels": 2, "copies": 2}


def test_a_figure_that_is_not_a_number_is_a_failure():
    findings = Findings()
    findings.at_most("error", float("nan"), 1.0)
    assert findings.failures and findings.tolerances == {"error": 1.0}


def test_a_wait_is_reported_with_the_line_that_causes_it():
    source = 'warnings.warn("called a synchronizing CUDA operation")'
    ours, other = ROOT / "megatron_smar" / "model" / "vlm.py", Path(os.__file__)
    with waits() as lines:
        for path in (ours, ours, other):
            exec(compile("\n" * 6 + source, str(path), "exec"), {"warnings": warnings})
        warnings.warn("something else", stacklevel=1)
    assert lines == {f"{ours}:7": 2, f"{other}:7": 1}
    assert is_ours(f"{ours}:7") and not is_ours(f"{other}:7")


def test_the_steps_import_no_package_that_a_gpu_machine_may_lack():
    names = sorted({step.place.partition(":")[0] for step in STEPS.values()} | {"__main__", "runner", "report"})
    code = f"import sys\nfor name in {NOT_NEEDED}: sys.modules[name] = None\n"
    code += "import importlib\n" + "\n".join(f"importlib.import_module('tests.gpu.{name}')" for name in names)
    run_program("-c", code)


@pytest.mark.matrix
@pytest.mark.parametrize("program", ["watched", "laboratory"])
def test_the_steps_programs_import_no_package_that_a_gpu_machine_may_lack_and_disable_tf32(program):
    code = f"import sys\nfor name in {NOT_NEEDED}: sys.modules[name] = None\nimport torch, tests.gpu.{program}\n"
    code += "assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32"
    run_program("-c", code, rank={"RANK": "0", "WORLD_SIZE": "1"})


@pytest.mark.matrix
def test_the_models_operations_are_counted_as_by_torch(tmp_path):
    """Uses this project's step, whose experts are plain products; torch counts no attention on the CPU, 2 % here."""
    code = f"""
from pathlib import Path
from torch.utils.flop_counter import FlopCounterMode
from tests.gpu.context import Context
from tests.gpu import speed
ours, theirs, _ = speed.build(Context("cpu", True, 1, 1.0, Path({str(tmp_path)!r}), Path({str(tmp_path)!r})))
with FlopCounterMode(display=False) as counter:
    ours()
print(counter.get_total_flops() / speed.model_flops(speed.QUICK))
"""
    done = run_program("-c", code)
    assert float(done.stdout.strip().splitlines()[-1]) == pytest.approx(0.98, abs=0.01)


@pytest.mark.matrix
def test_the_steps_take_their_cuda_branches_on_a_simulated_device(tmp_path, monkeypatch):
    """Steps that measure the device must fail here: they cannot pass without having measured anything."""
    (tmp_path / "sitecustomize.py").write_text(CLAIM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = "environment attention routing files bf16 moves packing latent recompute grouped offload waits speed memory"
    on_cuda = replace(settings(tmp_path, 1500.0), device="cuda")
    steps = [replace(step, limit=4 * step.limit) for step in chosen(names.split(), "cuda", 1)]
    rows = {row.step: row for row in run_steps(steps, on_cuda, lambda row, left: None)}
    failed = {name: row.reason for name, row in rows.items() if row.result != "passed"}
    assert failed.keys() == {"waits", "memory"}, failed
    assert failed["waits"] == "torch did not report a wait that was there"
    assert failed["memory"].startswith("counted / after a step is")
    assert rows["environment"].figures["card"] == "simulated H100" and rows["offload"].figures["resumed"] == 0


@pytest.mark.matrix
def test_all_steps_run_on_the_cpu(tmp_path):
    done, steps = on_the_cpu(tmp_path, "--minutes", "25", "--nproc", "2")
    assert done.returncode == 0, done.stdout
    needs_gpu = {step.name for step in STEPS.values() if step.needs_cuda}
    assert {name for name, step in steps.items() if step["result"] == "skipped"} == needs_gpu
