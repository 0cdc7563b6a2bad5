# SPDX-License-Identifier: Apache-2.0
"""Tests that leaving out the logits of positions without a loss changes neither losses nor gradients.

tests/distributed/test_exactness.py compares parallel layouts with one process, sequence parallelism included.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import build_model, prepare, save_tower

IMAGE, SIDE = 5, 32


def gradients(model: Any, batch: dict[str, Any], mask: Tensor, positions: Tensor | None) -> tuple[Tensor, dict]:
    """Returns the masked losses [b, s], and the gradients of their sum."""
    model.zero_grad()
    losses = model(**batch, labels=batch["input_ids"], loss_positions=positions) * mask
    losses.sum().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def model(single_rank, tmp_path) -> Any:
    return build_model(save_tower(tmp_path)).double()


@pytest.mark.parametrize("kept", ["answers", "everything", "nothing"])
def test_leaving_out_logits_without_a_loss_changes_a_loss_or_a_gradient(model, kept):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 128, (2, 24), generator=generator)
    ids[0, :4] = IMAGE
    batch = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.randn(1, 3, SIDE, SIDE).double(), IMAGE)
    mask = {"everything": torch.ones(2, 24), "nothing": torch.zeros(2, 24)}.get(kept)
    mask = torch.randint(2, (2, 24), generator=generator).double() if mask is None else mask
    expected = gradients(model, batch, mask, None)
    found = gradients(model, batch, mask, mask.t().flatten().nonzero().squeeze(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the cross-entropy is computed in float32


def test_the_output_layer_computes_logits_that_no_loss_needs(model):
    rows = []
    model.language_model.output_layer.register_forward_hook(lambda _, __, output: rows.append(output[0].shape[:2]))
    ids = torch.full((2, 24), 9)
    batch = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(0, 3, SIDE, SIDE).double(), IMAGE)
    model(**batch, labels=ids, loss_positions=torch.tensor([3, 20, 47]))
    assert rows == [(3, 1)]
