# SPDX-License-Identifier: Apache-2.0
"""The record of moved experts goes from a loaded checkpoint to the run's own, and old numbers in flags are refused."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_smar.checkpoint.expert_order import ExpertOrder, describe_placement, keep_expert_order, record, recorded
from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.torch_dist import Shard, write_checkpoint

ORDER = ExpertOrder({1: [1, 0, 2, 3], 3: [0, 1, 2, 3]}, 2, {"hard_experts": ["text=0,2", "vision=1,3"]})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    args = Namespace(modality_routing="hard", hard_experts=["text=1-2", "vision=0,3"])
    record(args, ORDER)
    shard = Shard("w", (0,), (2,), (2,), torch.float32, lambda: torch.zeros(2))
    write_checkpoint(tmp_path / "checkpoint", [shard], [], args, lambda _: None)
    return tmp_path / "checkpoint"


def run(load: Path | None, **more: object) -> Namespace:
    settings = {"modality_routing": "hard", "hard_experts": ["text=1-2", "vision=0,3"]} | more
    return Namespace(load=str(load) if load else None, ckpt_step=None, pretrained_checkpoint=None, **settings)


def test_a_run_takes_the_record_over_from_the_checkpoint_that_it_loads(checkpoint):
    args = run(checkpoint)
    keep_expert_order(args)
    assert recorded(args) == ORDER
    assert describe_placement(args) == "for 2 devices: 2 of 8 experts of 2 layers were moved"


def test_a_run_without_a_checkpoint_or_from_an_unplaced_one_has_no_record(tmp_path):
    args = run(None)
    keep_expert_order(args)
    assert recorded(args) is None and describe_placement(args) == ""


@pytest.mark.parametrize(("given", "said"), [(["text=0,2", "vision=1,3"], "text=0,2 vision=1,3"), ((), "its default")])
def test_flags_with_the_first_numbers_of_moved_experts_are_refused_with_the_present_ones(checkpoint, given, said):
    with pytest.raises(CheckpointMismatchError) as refusal:
        keep_expert_order(run(checkpoint, hard_experts=given))
    assert f"give --hard-experts text=1-2 vision=0,3 instead of {said}, or undo" in str(refusal.value)


def test_another_strategy_may_start_from_moved_experts(checkpoint):
    args = run(checkpoint, modality_routing="smar", hard_experts=())
    keep_expert_order(args)
    assert recorded(args) == ORDER
