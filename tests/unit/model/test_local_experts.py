# SPDX-License-Identifier: Apache-2.0
"""Tests the experts' layers, computed expert by expert, against autograd's."""

import pytest
import torch
from torch.nn.functional import silu

from megatron_smar.model.layers.local_experts import GatedExperts

SPLITS, HIDDEN, INNER = [4, 0, 5], 3, 6


def made(*shape: int, seed: int, trained: bool = True) -> torch.Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.requires_grad_(trained)


@pytest.mark.parametrize("trained", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)])
def test_the_experts_output_or_one_of_its_gradients_differs_from_autograds(trained):
    tokens = made(sum(SPLITS), HIDDEN, seed=1, trained=trained[0])
    first = [made(2 * INNER, HIDDEN, seed=10 + i, trained=trained[1]) for i in range(len(SPLITS))]
    second = [made(HIDDEN, INNER, seed=20 + i, trained=trained[2]) for i in range(len(SPLITS))]
    outputs = []
    for rows, weight1, weight2 in zip(tokens.split(SPLITS), first, second, strict=True):
        gate, up = (rows @ weight1.t()).chunk(2, dim=-1)
        outputs.append((silu(gate) * up) @ weight2.t())
    expected, found = torch.cat(outputs), GatedExperts.apply(tokens, SPLITS, *first, *second)
    torch.testing.assert_close(found, expected)
    wanted = [tensor for tensor in (tokens, *first, *second) if tensor.requires_grad]
    upstream = made(*expected.shape, seed=30, trained=False)
    for one, other in zip(*(torch.autograd.grad(y, wanted, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_experts_without_any_token_fail_or_get_no_gradient():
    first, second = made(2 * INNER, HIDDEN, seed=1), made(HIDDEN, INNER, seed=2)
    tokens = made(0, HIDDEN, seed=3)
    found = GatedExperts.apply(tokens, [0], first, second)
    assert found.shape == (0, HIDDEN)
    found.sum().backward()
    assert not first.grad.any() and not second.grad.any() and tokens.grad.shape == (0, HIDDEN)
