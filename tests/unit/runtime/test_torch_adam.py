# SPDX-License-Identifier: Apache-2.0
"""The gradient norm and its scaling, beside Megatron's own functions that they stand for."""

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
    """Megatron's own function makes a tensor on `cuda`."""


@given(SIZES)
def test_the_norm_is_megatrons_to_the_last_bit(sizes):
    ours, none = l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)
    theirs, _ = local_multi_tensor_l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)
    assert ours.shape == theirs.shape == (1,) and ours.dtype == torch.float32 and none is None
    assert torch.equal(ours, theirs)


@given(SIZES)
def test_the_norm_is_that_of_all_gradients_as_one_vector(sizes):
    exact = torch.cat(gradients(sizes)).double().norm()
    assert torch.allclose(l2_norm(0, NO_OVERFLOW, [gradients(sizes)], False)[0].double(), exact, rtol=1e-6)


@given(SIZES, st.floats(0.01, 1.0))
def test_gradients_are_scaled_where_they_lie_or_into_others(sizes, factor):
    expected = [tensor * factor for tensor in gradients(sizes)]
    there = gradients(sizes)
    scale(0, NO_OVERFLOW, [there, there], factor)
    copies = [torch.empty_like(tensor) for tensor in there]
    scale(0, NO_OVERFLOW, [gradients(sizes), copies], factor)
    for one, other, right in zip(there, copies, expected, strict=True):
        assert torch.equal(one, right) and torch.equal(other, right)
