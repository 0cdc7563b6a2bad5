# SPDX-License-Identifier: Apache-2.0
"""The statistics' all-reduce overlaps with the experts, is one collective per layer, and never waits for a device."""

import json
from pathlib import Path

from tests.distributed.batches import IMAGE
from tests.distributed.cases import COMMON, DESCENT, SMAR
from tests.launch import run


def test_each_layer_launches_one_collective_before_dispatch_and_waits_for_it_after_the_experts(tmp_path: Path) -> None:
    from tests.models import build_hf_model

    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(tmp_path)
    flags = [*COMMON, *DESCENT, *SMAR, "--vision-model", tmp_path]
    layout = ["--expert-model-parallel-size", "2", "--micro-batch-size", "4", "--train-iters", "1"]
    done = run("tests/distributed/order.py", *flags, *layout, ranks=2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("EVENTS ")]
    layer = ["bias", "statistics", "launch", "dispatch", "experts", "combine", "finish", "wait"]
    assert json.loads(line.removeprefix("EVENTS ")) == [*layer, *layer, "backward"]
