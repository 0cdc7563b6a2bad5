# SPDX-License-Identifier: Apache-2.0
"""Every part of the model on tensors without storage: devices never mix, types are as planned, few reads wait."""

import json
from typing import Any

import pytest

from tests.launch import run

# Megatron's dispatcher takes two tensors to the host, tokens by expert on this rank and by sender: one wait for both.
SPLITS = {"moe_utils:maybe_move_tensor_to_cpu": 2}
LAYERS = 2
# Whether the loss is a number, once per micro-batch: --no-check-for-nan-in-loss-and-grad switches it off.
STEP = {"moe_utils:maybe_move_tensor_to_cpu": 2 * LAYERS, "rerun_state_machine:validate_result": 1}
# What a pack would cost each layer, were its lengths on the device: Megatron's rotary embedding reads them for queries
# and keys, twice each, and our attention once.
LENGTHS = {"rope_utils:_apply_rotary_pos_emb_thd": 4, "local_layers:forward": 1}

# The host's reads of the device by part: in the forward pass, in the backward pass.
READS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "batch": ({}, {}),
    "vision encoder": ({}, {}),
    "connector": ({}, {}),
    "embedding merge": ({}, {}),
    "norm": ({}, {}),
    "attention": ({}, {}),
    "attention, grouped queries": ({}, {}),
    "attention, packed": ({}, {}),
    "attention layer, packed": ({}, {}),
    "attention layer, packed, lengths on the device": (LENGTHS, {}),
    "latent attention layer": ({}, {}),
    "latent attention layer, packed": ({}, {}),
    "router": ({}, {}),
    "routing statistics": ({}, {}),
    "experts": ({}, {}),
    "MoE layer": (SPLITS, {}),
    "output layer and loss": ({}, {}),
    "model": (STEP, {}),
    "model, text only": (STEP, {}),
    "model, packed": (STEP, {}),
    "model, packed, recomputed": (STEP, {"moe_utils:maybe_move_tensor_to_cpu": 2 * LAYERS}),
    "model, latent attention, packed": (STEP, {}),
}
FLOAT32 = {"batch", "router", "routing statistics", "output layer and loss"} | {p for p in READS if p[:5] == "model"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    run("-m", "tests.cuda_path.parts", folder, timeout=120)  # it replaces torch's functions, so in its own process
    return json.loads((folder / "results.json").read_text())


def part_of(results: dict[str, Any], device: str, part: str) -> dict[str, Any]:
    found = results[device][part]
    assert "error" not in found, found["error"]
    return found


def test_every_part_is_in_the_table(results):
    assert [*results["cuda"]] == [*results["meta"]] == [*READS, "metrics"]


@pytest.mark.parametrize("part", READS)
def test_a_part_stays_on_the_device_and_the_host_reads_no_more_than_the_table_says(results, part):
    forward, backward = READS[part]
    on_cuda, on_meta = (part_of(results, device, part) for device in ("cuda", "meta"))
    assert (on_cuda["device"], on_meta["device"]) == ("cuda", "meta")
    assert on_cuda["forward"] == on_meta["forward"] == forward
    assert on_meta.get("backward", {}) == backward


@pytest.mark.parametrize("part", READS)
def test_types_are_as_planned(results, part):
    """bf16, but float32 for modality biases, the router's weights, statistics and losses."""
    found = part_of(results, "meta", part)
    output = "torch.float32" if part in FLOAT32 else "torch.bfloat16"
    assert part_of(results, "cuda", part)["output"] == found["output"] == output
    for types in (found["parameters"], found.get("gradients", {})):
        for name, dtype in types.items():
            assert dtype == ("torch.float32" if "modality_bias" in name else "torch.bfloat16"), name
    assert part == "batch" or "gradients" in found, "no backward pass was made"


def test_every_parameter_gets_a_gradient_with_and_without_images(results):
    for part in ("model", "model, text only", "model, packed", "model, packed, recomputed"):
        left_out = [name for name in part_of(results, "meta", part)["without gradient"] if "mask_token" not in name]
        assert not left_out, f"{part}: {left_out}"


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_metrics_are_read_only_at_steps_that_log_them(results, device):
    """Points every 5 steps, lines every 10, of which step 1 has one too; Megatron writes `smar loss` itself."""
    own = {"monitor:_reduced_sums": 1}
    assert results[device]["metrics"] == {"1": own, "2": {}, "10": own | {"moe_logging:_log_scalars": 1}}
