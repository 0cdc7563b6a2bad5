# SPDX-License-Identifier: Apache-2.0
"""Tests with NVIDIA's apex installed: it is used on CUDA and ignored on the CPU.

apex's kernels need a GPU, so a fake package with the same interface replaces it here: everything that computes raises.
With it arguments, model, optimizer and the optimizer's state in a checkpoint are built; no training step has ever run.
"""

import json
from pathlib import Path

import pytest

from tests.cuda_path.recipes import command_on_gpus, run_script
from tests.launch import run

pytestmark = pytest.mark.matrix

RAISES = """
def __getattr__(name):
    def kernel(*args, **kwargs):
        raise RuntimeError(f"apex's kernel {name} was called without a GPU")
    return kernel
"""
FUSED_ADAM = '''
import torch

class FusedAdam(torch.optim.Optimizer):
    """The constructor and the groups of apex's class, which stores the step in the group; its step is a kernel."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    def step(self, *args, **kwargs):
        raise RuntimeError("apex's FusedAdam was called without a GPU")

FusedSGD = FusedAdam
'''
FILES = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": RAISES,
    "apex/normalization/fused_layer_norm.py": RAISES,
    "apex/multi_tensor_apply/__init__.py": RAISES,
    "apex/optimizers/__init__.py": FUSED_ADAM,
    "amp_C.py": RAISES,
    "fused_layer_norm_cuda.py": RAISES,
    "fused_weight_gradient_mlp_cuda.py": RAISES,
}


@pytest.fixture(scope="module")
def apex(tmp_path_factory) -> Path:
    """A folder with the fake apex, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("apex")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A recipe's output folder with its converted small model."""
    folder = tmp_path_factory.mktemp("recipe") / "mixtral_8x7b_internvit"
    run_script(folder.name, "convert", folder, "--tiny")
    return folder


def constructed(output: Path) -> dict:
    """Returns what a run with the 64-GPU layout's flags builds on a simulated CUDA device."""
    _, given = command_on_gpus(output.name, "stage1", 64, output, DATA=str(output / "input" / "stage1"))
    small = ["--freeze", "vision", "--expert-model-parallel-size", 1, "--global-batch-size", 1, "--seq-length", 256]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run("tests/cuda_path/construct.py", output / "made.json", *given, *small, rank=place)
    return json.loads((output / "made.json").read_text())


def test_apex_is_used_on_cuda_and_its_optimizer_saves_the_same_state_as_torchs(apex, output, monkeypatch):
    without = constructed(output)
    monkeypatch.setenv("PYTHONPATH", str(apex))
    with_apex = constructed(output)
    assert set(without["optimizers"]) == {"AdamW"} and set(with_apex["optimizers"]) == {"FusedAdam"}
    assert with_apex["state"] == without["state"] and any("exp_avg_sq" in name for name in without["state"])
    assert not without["flags"]["gradient_accumulation_fusion"] and with_apex["flags"]["gradient_accumulation_fusion"]
    assert without["flags"]["transformer_impl"] == with_apex["flags"]["transformer_impl"] == "local"


def test_apex_without_its_fused_weight_gradients_is_used_too(apex, output, monkeypatch, tmp_path):
    for name in FILES:
        if name != "fused_weight_gradient_mlp_cuda.py":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).symlink_to(apex / name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = constructed(output)
    assert set(made["optimizers"]) == {"FusedAdam"} and not made["flags"]["gradient_accumulation_fusion"]


def test_a_tiny_recipe_trains_on_the_cpu_with_apex_installed(apex, output):
    run_script(output.name, "stage1", output, "--tiny", PYTHONPATH=str(apex))
    assert (output / "stage1" / "latest_checkpointed_iteration.txt").read_text() == "5"
