# SPDX-License-Identifier: Apache-2.0
"""Tests of the detection of the device, and of what the adaptations change."""

from pathlib import Path

import pytest

from megatron_smar.runtime.environment import GPU_PACKAGES
from tests.launch import ROOT
from tests.unit.runtime.interpreter import failures, python

INSTALLED = {
    "GPUs hidden": """
import os, sys
from megatron_smar import runtime
sys.path.insert(0, os.environ["GPU_PACKAGES"])
assert runtime.install() == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
""",
    "programs": """
import os, sys
from pathlib import Path
sys.path.insert(0, os.environ["EXAMPLE"])
from steps import run_program
for device, visible in (("cpu", ""), ("cuda", "0")):
    log = Path(os.environ["GPU_PACKAGES"]) / f"{device}.log"
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), os.environ['MEGATRON_SMAR_DEVICE'])"
    run_program([sys.executable, "-c", code], log, log.parent, threads=1, device=device)
    assert f"{visible!r} {device}" in log.read_text(), log.read_text()
""",
    "GPU packages": """
import megatron.core.optimizer, megatron.core.tensor_parallel.layers as layers
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
assert USING_PYTORCH_OPTIMIZER and not layers._grad_accum_fusion_available
""",
    "large tensor": """
import torch
x = torch.ones(2**26, dtype=torch.uint8)
huge = next(line for line in open('/proc/self/smaps_rollup') if 'AnonHuge' in line).split()[1]
assert int(huge) > 2**15, f"{huge} KB"
""",
    "second installation": """
import torch
from megatron_smar import runtime
first, zeros, listed = torch.Tensor.cuda, torch.zeros, runtime.adaptations()
runtime.install()
assert (torch.Tensor.cuda, torch.zeros, runtime.adaptations()) == (first, zeros, listed)
names = [a.name for a in listed]
assert "forget_members_that_were_read" in names
assert len(names) == len(set(names)) > 10 and all(a.reason and a.needed_by for a in listed)
""",
    "redirected calls": """
import torch
assert torch.zeros(2, device="cuda").device == torch.full((2,), 1.0, device=0).device == torch.device("cpu")
assert torch.ones(1).cuda().device.type == "cpu" and not torch.cuda.is_available()
with torch.device("meta"):
    assert torch.arange(3).device.type == "meta"  # transformers builds models this way
a, b = torch.cuda.Event(), torch.cuda.Event()
a.record(); b.record()
assert a.elapsed_time(b) >= 0
""",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """What of INSTALLED fails in an interpreter on the CPU that could see a GPU and import the packages for GPUs."""
    place = tmp_path_factory.mktemp("packages")
    for name in GPU_PACKAGES:
        (place / f"{name}.py").write_text("raise RuntimeError('imported on the CPU')")
    own = {"GPU_PACKAGES": str(place), "EXAMPLE": str(ROOT / "examples" / "emoji_tiny")}
    return failures(INSTALLED, MEGATRON_SMAR_DEVICE="cpu", CUDA_VISIBLE_DEVICES="0", **own)


@pytest.mark.parametrize(("wanted", "said"), [("tpu", "set it to cpu or cuda"), ("cuda", "torch finds no CUDA device")])
def test_a_wrong_device_is_refused_in_one_sentence(wanted, said):
    done = python(
        "from megatron_smar import runtime; runtime.install()",
        MEGATRON_SMAR_DEVICE=wanted,
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode != 0
    assert said in done.stderr.strip().splitlines()[-1]


def test_a_second_installation_changes_nothing(installed):
    assert "second installation" not in installed, installed


def test_on_cuda_torch_is_unchanged_and_only_adaptations_for_cuda_are_applied():
    """On a machine that reports CUDA, install() must not change torch's functions but must still fix Megatron."""
    code = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)  # all that detection calls
before = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")}, torch.Tensor.cuda, torch.cuda.Stream
from megatron_smar import runtime
assert runtime.install() == "cuda"
after = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")}, torch.Tensor.cuda, torch.cuda.Stream
assert after == before and "transformer_engine" not in sys.modules
Where = runtime.Where
assert {a.where for a in runtime.adaptations()} == {Where.ANYWHERE, Where.CUDA, Where.TORCH_ADAM}
import megatron.core.datasets.utils as helpers
helpers.compile_helpers()  # there is no Makefile: Megatron's own would end the process
assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
defaults = runtime.argument_defaults()
assert defaults["transformer_impl"] == "local" and "distributed_backend" not in defaults, defaults
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_cuda_calls_are_redirected_to_the_cpu_and_device_contexts_still_work(installed):
    assert "redirected calls" not in installed, installed


def test_on_the_cpu_gpus_are_hidden_from_this_process_and_its_children(installed):
    assert "GPUs hidden" not in installed, installed


def test_programs_that_an_example_starts_on_the_gpu_do_not_see_it(installed):
    assert "programs" not in installed, installed


def test_installed_gpu_packages_are_not_imported_on_the_cpu(installed):
    """Covers Transformer Engine, apex and its extensions; Megatron uses each of them wherever it can be imported."""
    assert "GPU packages" not in installed, installed


def test_a_large_tensor_on_the_host_is_in_small_pages(installed):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the kernel gives no huge pages")
    assert "large tensor" not in installed, installed


@pytest.mark.matrix
def test_a_second_parser_of_all_flags_parses_megatrons_sources_again_or_has_another_help():
    code = """
import argparse, ast, torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
from megatron.training.arguments import add_megatron_arguments
def texts():
    return {flag.dest: flag.help for flag in add_megatron_arguments(argparse.ArgumentParser())._actions}
own = texts()
from megatron_smar import runtime
assert runtime.install() == "cuda"
assert texts() == own and "parallel" in own["tensor_model_parallel_size"]
ast.parse = None
assert texts() == own
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
