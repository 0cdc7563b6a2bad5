# SPDX-License-Identifier: Apache-2.0
"""Tests of the device that a process gets, and of the errors when it cannot have the device it should."""

import pytest

from megatron_smar.runtime.environment import expected_gpus
from tests.unit.runtime.interpreter import python

FILES = ["/dev/nvidia0", "/dev/nvidia1"]


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


def test_gpus_that_were_counted_before_they_could_be_hidden_are_an_error():
    code = """
import torch
torch.cuda.is_available = lambda: True  # as if torch had counted a GPU already
from megatron_smar import runtime
runtime.install_or_exit()
"""
    done = python(code, MEGATRON_SMAR_DEVICE="cpu")
    assert done.returncode == 1 and "import megatron_smar.runtime first" in done.stderr


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
