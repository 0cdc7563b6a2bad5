# SPDX-License-Identifier: Apache-2.0
"""Loader states converted to plain values and back."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.energon.rng import SystemRng
from megatron.energon.state import FlexState

from megatron_smar.data.state import from_plain, to_plain

text = st.text(alphabet="ab", min_size=1, max_size=3)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | st.binary(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(text, inner)
        | st.dictionaries(text, inner).map(FlexState)
    ),
    max_leaves=6,
)


def through_a_file(value: object) -> object:
    torch.save(to_plain(value), stream := io.BytesIO())
    stream.seek(0)
    return from_plain(torch.load(stream, weights_only=True))


@given(values)
@settings(max_examples=40, deadline=None)
def test_states_survive_a_weights_only_file(value: object) -> None:
    result = through_a_file(value)
    assert result == value and type(result) is type(value)


def test_random_states_survive() -> None:
    SystemRng.seed(5)
    state = SystemRng.save_state()
    expected = (torch.rand(3), np.random.rand(3))
    SystemRng.restore_state(through_a_file(state))
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


def test_an_unknown_class_is_refused_when_saving_not_when_resuming() -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        to_plain([Path("x")])
