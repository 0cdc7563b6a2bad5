# SPDX-License-Identifier: Apache-2.0
"""The weights of --loss-weighting, against a loop over the samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.data.loss_weighting import LOSS_WEIGHTINGS, loss_weights

# What a sample of n loss tokens weighs in total.
TOTALS = {"token": lambda n: n, "sample": lambda n: 1.0 if n else 0.0, "sqrt": lambda n: n**0.5}
SAMPLES = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=8)


def expected(samples: list[list[bool]], weighting: str) -> list[np.ndarray]:
    """Returns each sample's weights in float64: its total, spread evenly over its loss tokens."""
    return [np.asarray(sample) * TOTALS[weighting](sum(sample)) / max(sum(sample), 1) for sample in samples]


@given(SAMPLES, st.sampled_from(LOSS_WEIGHTINGS))
def test_a_row_weighs_the_power_of_its_loss_tokens_and_padding_nothing(samples, weighting):
    length = max(map(len, samples))
    padded = [sample + [False] * (length - len(sample)) for sample in samples]
    found = loss_weights(torch.tensor(padded).float(), None, weighting)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), np.stack(expected(padded, weighting)), rtol=1e-7)


@given(SAMPLES, st.integers(0, 9), st.sampled_from(LOSS_WEIGHTINGS))
def test_samples_of_a_pack_are_weighted_separately(samples, padding, weighting):
    sequences = [*samples, [False] * padding]
    mask = torch.tensor([token for sequence in sequences for token in sequence]).float()[None]
    found = loss_weights(mask, torch.tensor([len(sequence) for sequence in sequences]), weighting)
    np.testing.assert_allclose(found[0].double().numpy(), np.concatenate(expected(sequences, weighting)), rtol=1e-7)


@pytest.mark.parametrize(("weighting", "totals"), [("token", [16, 4, 0]), ("sample", [1, 1, 0]), ("sqrt", [4, 2, 0])])
def test_what_samples_of_16_4_and_0_loss_tokens_weigh(weighting, totals):
    mask = (torch.arange(20) < torch.tensor([[16], [4], [0]])).float()
    assert loss_weights(mask, None, weighting).sum(dim=1).tolist() == pytest.approx(totals)
