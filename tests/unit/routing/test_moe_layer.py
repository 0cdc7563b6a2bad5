# SPDX-License-Identifier: Apache-2.0
"""Tests of the MoE layer: which tokens its experts compute.

tests/distributed/test_exactness.py compares the gradients under --skip-unused-experts with those of all experts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import build_model, prepare, save_tower

IMAGE, SIDE, TOP_K = 5, 32, 2
LOSS_POSITIONS = torch.tensor([3, 20, 47])


def computed_tokens(model: Any, **inputs: Any) -> list[int]:
    """Returns how many copies of tokens each layer's experts compute in a forward pass."""
    copies, handles = [], []
    for layer in model.language_model.decoder.layers:
        count = lambda _, inputs: copies.append(len(inputs[0]))  # noqa: E731
        handles.append(layer.mlp.experts.register_forward_pre_hook(count))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return copies


@pytest.fixture
def batch(single_rank: None) -> dict[str, Tensor]:
    ids = torch.randint(6, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[0, :4] = IMAGE
    return prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.randn(1, 3, SIDE, SIDE), IMAGE)


def skipping_model(folder: Any, **settings: Any) -> Any:
    return build_model(save_tower(folder), skips_unused=True, **settings)


def test_experts_of_the_last_layer_compute_tokens_without_a_loss(batch, tmp_path):
    model = skipping_model(tmp_path).train()
    labels = batch["input_ids"]
    everything = TOP_K * labels.numel()
    found = computed_tokens(model, **batch, labels=labels, loss_positions=LOSS_POSITIONS)
    assert found == [everything, everything, TOP_K * len(LOSS_POSITIONS)]


def test_experts_are_skipped_where_all_outputs_are_read(batch, tmp_path):
    model = skipping_model(tmp_path)
    everything = [TOP_K * batch["input_ids"].numel()] * 3
    assert computed_tokens(model.train(), **batch) == everything, "logits of all positions"
    evaluated = computed_tokens(model.eval(), **batch, labels=batch["input_ids"], loss_positions=LOSS_POSITIONS)
    assert evaluated == everything


def test_a_batch_without_any_loss_leaves_the_experts_without_tokens(batch, tmp_path):
    model, nothing = skipping_model(tmp_path).train(), LOSS_POSITIONS[:0]
    found = computed_tokens(model, **batch, labels=batch["input_ids"], loss_positions=nothing)
    assert found[-1] == TOP_K
    loss = model(**batch, labels=batch["input_ids"], loss_positions=nothing)
    assert not loss.any()
    loss.sum().backward()


def test_statistics_of_the_last_layer_lack_the_tokens_that_its_experts_skip(batch, tmp_path):
    reports: dict[bool, list[Any]] = {}
    for skips in (False, True):
        torch.manual_seed(3)
        model = build_model(save_tower(tmp_path), routing={"strategy": "smar"}, skips_unused=skips).train()
        found = reports[skips] = []
        model.language_model.decoder.layers[-1].mlp.router.observers.append(found.append)
        model(**batch, labels=batch["input_ids"], loss_positions=LOSS_POSITIONS)
    (every,), (skipped,) = reports[False], reports[True]
    assert every.statistics.counts.sum() == TOP_K * batch["input_ids"].numel()
    torch.testing.assert_close(skipped.statistics.counts, every.statistics.counts)
    torch.testing.assert_close(skipped.losses, every.losses)
