# SPDX-License-Identifier: Apache-2.0
"""Tests of the device that a process gets, and of the errors when it cannot have the device it should."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_smar.runtime.environment import expected_gpus
from tests.launch import ROOT

FILES = ["/dev/nvidia0", "/dev/nvidia1"]


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    base = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=base | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("variables", "files", "said"),
    [
        ({}, FILES, "/dev/nvidia0"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [], "CUDA_VISIBLE_DEVICES=0,1"),
        ({"SLURM_JOB_GPUS": "3"}, [], "SLURM_JOB_GPUS=3"),
        ({"SLURM_GPUS_ON_NODE": "8"}, [], "SLURM_GPUS_ON_NODE=8"),
        ({}, [], None),
        ({"SLURM_GPUS_ON_NODE": "0"}, [], None),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "3"}, FILES, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, FILES, None),
    ],
)
def test_gpus_of_the_machine_or_job_are_expected_unless_they_are_hidden(variables, files, said):
    assert expected_gpus(variables, files) == said


def test_expected_gpus_that_torch_cannot_use_are_an_error_and_not_a_silent_cpu_run():
    done = python("from megatron_smar import runtime; runtime.install_or_exit()", CUDA_VISIBLE_DEVICES="99")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "GPUs are expected here (CUDA_VISIBLE_DEVICES=99)" in done.stderr
    assert "set MEGATRON_SMAR_DEVICE=cpu" in done.stderr


def test_more_processes_than_gpus_are_refused_with_their_number():
    code = """
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
from megatron_smar import runtime
runtime.install_or_exit()
"""
    done = python(code, LOCAL_RANK="2")
    assert done.returncode == 1 and "start at most 2 per node (torchrun --nproc-per-node 2)" in done.stderr


def test_on_the_cpu_gpus_are_hidden_from_this_process_and_its_children():
    code = """
import os, torch
from megatron_smar import runtime
assert runtime.install() == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
"""
    done = python(code, MEGATRON_SMAR_DEVICE="cpu", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr


def test_gpus_that_were_counted_before_they_could_be_hidden_are_an_error():
    code = """
import torch
torch.cuda.is_available = lambda: True  # as if torch had counted a GPU already
from megatron_smar import runtime
runtime.install_or_exit()
"""
    done = python(code, MEGATRON_SMAR_DEVICE="cpu")
    assert done.returncode == 1 and "import megatron_smar.runtime first" in done.stderr


def test_installed_gpu_packages_are_not_imported_on_the_cpu(tmp_path):
    """Covers Transformer Engine, apex and its extensions; Megatron uses each of them wherever it can be imported."""
    from megatron_smar.runtime.environment import GPU_PACKAGES

    for name in GPU_PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported on the CPU')")
    code = """
import sys
from megatron_smar import runtime
sys.path.insert(0, PLACE)
runtime.install()
import megatron.core.optimizer, megatron.core.tensor_parallel.layers as layers
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
assert USING_PYTORCH_OPTIMIZER and not layers._grad_accum_fusion_available
""".replace("PLACE", repr(str(tmp_path)))
    done = python(code, MEGATRON_SMAR_DEVICE="cpu")
    assert done.returncode == 0, done.stderr


def test_a_gpu_package_that_was_imported_first_is_named(tmp_path):
    (tmp_path / "amp_C.py").write_text("")
    code = f"""
import sys
from megatron_smar import runtime
sys.path.insert(0, {str(tmp_path)!r})
import amp_C
runtime.install_or_exit()
"""
    done = python(code, MEGATRON_SMAR_DEVICE="cpu")
    assert done.returncode == 1 and "amp_C was imported before" in done.stderr


def test_a_large_tensor_on_the_host_is_in_small_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the kernel gives no huge pages")
    program = (
        "from megatron_smar import runtime; runtime.install(); import torch; x = torch.ones(2**26, dtype=torch.uint8); "
        "print(next(line for line in open('/proc/self/smaps_rollup') if 'AnonHuge' in line).split()[1])"
    )
    assert int(python(program, MEGATRON_SMAR_DEVICE="cpu").stdout.split()[-1]) > 2**15  # KB
