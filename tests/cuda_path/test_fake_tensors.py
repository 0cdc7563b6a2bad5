# SPDX-License-Identifier: Apache-2.0
"""Tests every part of the model on tensors without storage: no mixed devices, the intended dtypes, few waits."""

import json
from typing import Any

import pytest

from tests.launch import run

LAYERS = 2
# Megatron's dispatcher copies two tensors to the host, tokens per expert on this rank and tokens per sender: the
# all-to-all needs its split sizes there. It waits for one event for both copies.
SPLITS = {"read moe_utils:maybe_move_tensor_to_cpu": 2, "wait token_dispatcher:_maybe_dtoh_and_synchronize": 1}
EVERY_LAYER = {who: LAYERS * number for who, number in SPLITS.items()}
# Megatron's reruns check once per micro-batch whether the loss is a number: --rerun-mode disabled or
# --no-check-for-nan-in-loss-and-grad disables that. This project's check of steps reads only the gradient norm.
STEP = EVERY_LAYER | {"read rerun_state_machine:validate_result": 1}
# Reads per layer if a pack's lengths were on the device: Megatron's rotary embedding reads them for queries and keys,
# twice each, and this project's attention for the positions that it rotates by and for the sequences.
LENGTHS = {
    "read rope_utils:_apply_rotary_pos_emb_thd": 4,
    "read local_attention:_positions_in_sequences": 1,
    "read local_attention:forward": 1,
}

# Waits of the host by part, in the forward and in the backward pass. No part has an upload: copies to the device are
# made from pinned memory and do not block.
WAITS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "batch": ({}, {}),
    "vision encoder": ({}, {}),
    "vision encoder, CLIP": ({}, {}),
    "vision encoder, SigLIP": ({}, {}),
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
    "router's logits": ({}, {}),
    "router without modality biases": ({}, {}),
    "routing statistics": ({}, {}),
    "experts": ({}, {}),
    "MoE layer": (SPLITS, {}),
    "output layer and loss": ({}, {}),
    "model": (STEP, {}),
    "model, text only": (STEP, {}),
    "model, packed": (STEP, {}),
    "model, packed, recomputed": (STEP, EVERY_LAYER),
    "model, latent attention, packed": (STEP, {}),
    "model, parallel blocks and biases, packed": (STEP, {}),
    "model, norms of projections, packed": (STEP, {}),
    "gradient norm and clipping": ({}, {}),  # Megatron then reads the norm, once
    "evaluation, a batch": (EVERY_LAYER | {"read evaluator:_loss_and_hit": 1}, {}),
}
NO_BACKWARD = ("batch", "gradient norm and clipping", "evaluation, a batch")
BFLOAT16 = {"connector", "embedding merge", "norm", "experts", "MoE layer"}
BFLOAT16 |= {part for part in WAITS if part.startswith(("vision encoder", "attention", "latent attention"))}

# Controls that `storage_less` must detect (`controls`): the kind of wait, or None for no wait.
NOTICED = {
    "work on the device": None,
    "a number": "read",
    "a decision": "read",
    "a list": "read",
    "a copy to the host": "read",
    "an asynchronous copy to the host": "read",
    "a copy into a tensor of the host": "read",
    "numbers made into a tensor": "upload",
    "a copy from pageable memory": "upload",
    "a blocking copy from pinned memory": "upload",
    "a copy from pinned memory": None,
    "a pageable copy into a tensor of the device": "upload",
    "indices of the host": "upload",
    "an event": "wait",
    "the device": "wait",
}
SIZES = ("a size that the device knows", "a choice by a mask")
MIXED = ("a tensor of the host", "a tensor of the host within the model")
DEVICES = ("cuda", "meta")


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
    assert [*results["cuda"]] == [*results["meta"]] == [*WAITS, "metrics", "controls"]


@pytest.mark.parametrize("part", WAITS)
def test_a_part_stays_on_the_device_and_the_host_waits_exactly_as_in_the_table(results, part):
    forward, backward = WAITS[part]
    on_cuda, on_meta = (part_of(results, device, part) for device in DEVICES)
    assert (on_cuda["device"], on_meta["device"]) == DEVICES
    assert on_cuda["forward"] == on_meta["forward"] == forward
    assert on_meta.get("backward", {}) == backward


@pytest.mark.parametrize("part", WAITS)
def test_dtypes_are_bf16_or_float32_as_intended(results, part):
    """All are bf16, except float32 for modality biases, the router's logits and weights, statistics and losses."""
    found = part_of(results, "meta", part)
    output = "torch.bfloat16" if part in BFLOAT16 else "torch.float32"
    assert part_of(results, "cuda", part)["output"] == found["output"] == output
    for types in (found["parameters"], found.get("gradients", {})):
        for name, dtype in types.items():
            assert dtype == ("torch.float32" if "modality_bias" in name else "torch.bfloat16"), name
    assert ("gradients" in found) != (part in NO_BACKWARD)


def test_every_parameter_gets_a_gradient_with_and_without_images(results):
    for part in (part for part in WAITS if part.startswith("model")):
        left_out = [name for name in part_of(results, "meta", part)["without gradient"] if "mask_token" not in name]
        assert not left_out, f"{part}: {left_out}"


@pytest.mark.parametrize("device", DEVICES)
def test_metrics_are_read_only_at_steps_that_log_them(results, device):
    """Scalars are due every 5 steps, console lines every 10 and at step 1; Megatron writes `smar loss` itself."""
    own = {"read tracker:_reduced_sums": 1}
    megatrons = {"read moe_logging:_log_scalars": 1}
    assert results[device]["metrics"] == {"1": own, "2": {}, "5": own | megatrons, "10": own | megatrons}


@pytest.mark.parametrize("device", DEVICES)
def test_every_control_is_tried(results, device):
    assert {*results[device]["controls"]} == {*NOTICED, *SIZES, *MIXED, "a number read within the model"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("control", "kind"), NOTICED.items())
def test_each_kind_of_wait_is_counted(results, device, control, kind):
    found = results[device]["controls"][control]
    assert "error" not in found, found["error"]
    assert found["forward"] == ({} if kind is None else {f"{kind} a test": 1})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("control", SIZES)
def test_an_output_size_that_depends_on_the_devices_data_is_an_error(results, device, control):
    assert results[device]["controls"][control]["error"].startswith("DynamicOutputShapeException")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("control", MIXED)
def test_mixing_tensors_of_host_and_device_is_an_error(results, device, control):
    assert results[device]["controls"][control]["error"].startswith("FakeTensorDeviceMismatchError")


@pytest.mark.parametrize("device", DEVICES)
def test_a_read_within_the_model_is_counted_for_the_calling_function(results, device):
    found = results[device]["controls"]["a number read within the model"]
    assert found["forward"] == STEP | {"read vlm:_embed": 1}
