# SPDX-License-Identifier: Apache-2.0
"""Tests of the gradient norm and the scaling of gradients, compared with the Megatron functions that they replace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_smar.runtime.torch_adam import l2_norm, scale

NO_OVERFLOW = torch.zeros(1, dtype=torch.int)
SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=8)


def gradients(sizes: list[int]) -> list[torch.Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]


@pytest.fixture(autouse=True)
def _redirected(single_rank):
    """Redirects CUDA to the CPU: Megatron's own function creates a tensor on `cuda`."""


@given(SIZES)
def test_the_norm_equals_megatrons_bit_by_bit(sizes):
    ours, none = l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)
    theirs, _ = local_multi_tensor_l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)
    assert ours.shape == theirs.shape == (1,) and ours.dtype == torch.float32 and none is None
    assert torch.equal(ours, theirs)


@given(SIZES)
def test_the_norm_equals_that_of_all_gradients_concatenated(sizes):
    exact = torch.cat(gradients(sizes)).double().norm()
    assert torch.allclose(l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)[0].double(), exact, rtol=1e-6)


@given(SIZES, st.floats(0.01, 1.0))
def test_gradients_are_scaled_in_place_or_into_other_tensors(sizes, factor):
    expected = [tensor * factor for tensor in gradients(sizes)]
    in_place = gradients(sizes)
    scale(0, NO_OVERFLOW, [in_place, in_place], factor)
    copies = [torch.empty_like(tensor) for tensor in in_place]
    scale(0, NO_OVERFLOW, [gradients(sizes), copies], factor)
    for one, other, right in zip(in_place, copies, expected, strict=True):
        assert torch.equal(one, right) and torch.equal(other, right)
