# SPDX-License-Identifier: Apache-2.0
"""Tests of the recipes' first command, convert.py, on machines with GPUs: it describes models without using a GPU."""

import pytest

from tests.launch import run

DESCRIBE = """
import sys
sys.path.insert(0, "examples")
from tests.redirected_cuda import claim_cuda, stand_for_the_device_in_megatron
claim_cuda()
from megatron_smar import runtime
runtime.install()
stand_for_the_device_in_megatron()
from architectures import ARCHITECTURES
from megatron_smar.conversion import composite, empty_model
architecture = ARCHITECTURES["qwen3_30b_a3b_internvl"]
text = architecture.language
text.num_hidden_layers = 4
config = composite.combine(text, architecture.vision, composite.Connection(), text.vocab_size - 1, text.vocab_size)
built = []
build_empty = empty_model.build_empty
empty_model.build_empty = lambda args: built.append(build_empty(args)) or built[-1]
_, tensors, _ = empty_model.describe_model(config, composite.flags(config))
held = {parameter.device.type for parameter in built[0].parameters()}
assert held == {"meta"}, f"parameters of 128 experts per layer were allocated on {held}"
assert len(tensors) > 500
"""


def test_a_model_is_described_without_allocating_gpu_memory():
    run("-c", DESCRIBE)


@pytest.mark.matrix
def test_the_converter_runs_on_the_cpu_if_the_gpus_cannot_be_used(tmp_path):
    """As on a login node with CUDA_VISIBLE_DEVICES set and no driver: training is refused, conversion is not."""
    place = {"MEGATRON_SMAR_DEVICE": "", "CUDA_VISIBLE_DEVICES": "99"}  # there is no such GPU
    done = run("pretrain_vlm.py", rank=place, check=False)
    assert done.returncode == 1 and "GPUs are expected here" in done.stdout
    done = run("tools/checkpoint/convert.py", "inspect", tmp_path, rank=place, check=False)
    assert "GPUs are expected" not in done.stdout and "holds no checkpoint" in done.stdout
