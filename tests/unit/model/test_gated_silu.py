# SPDX-License-Identifier: Apache-2.0
"""Tests the experts' activation against autograd's."""

import torch

from megatron_smar.model.layers.local_experts import GatedSilu


def test_the_experts_activation_or_its_gradient_differs_from_autograds():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    gate, up = hidden.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    found = GatedSilu.apply(hidden, [4, 0, 5])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, hidden, upstream)[0] for y in (found, expected)))
