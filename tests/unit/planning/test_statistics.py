# SPDX-License-Identifier: Apache-2.0
"""Tests of the arithmetic of the tables in docs/scaling.md."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.commands.plan import main
from megatron_smar.planning import statistics as scaling
from megatron_smar.routing import PendingStatistics, routing_statistics

ROOT = Path(__file__).resolve().parents[3]


def reduced_floats(experts: int, modalities: int) -> int:
    """Returns the number of floats that a layer really reduces."""
    sums = routing_statistics(
        torch.rand(6, experts), torch.ones(6, experts, dtype=torch.bool), torch.arange(6) % modalities, modalities
    )
    return PendingStatistics(sums, group=None)._packed.numel()


def test_the_document_shows_what_the_program_prints(capsys):
    main(["statistics"])
    printed = capsys.readouterr().out
    assert printed.strip() in (ROOT / "docs/scaling.md").read_text(), f"put this into docs/scaling.md:\n{printed}"


@given(st.integers(1, 300), st.integers(2, 5))
def test_floats_per_layer_equal_the_size_of_the_reduced_tensor(experts, modalities):
    model = scaling.Model("any", 1, 8, 8, experts, 1, modalities)
    assert scaling.floats_per_layer(model) == reduced_floats(experts, modalities)


@given(st.integers(1, 100), st.integers(1, 16), st.sampled_from([8, 64, 1024]))
def test_the_share_does_not_depend_on_layers_or_micro_batches(layers, micro_batches, ranks):
    small = scaling.Model("any", 1, 64, 64, 8, 2)
    large = scaling.Model("any", layers, 64, 64, 8, 2)
    one, many = scaling.Setup(models=(small,)), scaling.Setup(micro_batches=micro_batches, models=(large,))
    assert scaling.share(large, many, ranks) == pytest.approx(scaling.share(small, one, ranks))


def test_volumes_by_hand():
    """Mixtral on 8 ranks, 1 token: 34 floats * 4 bytes * 2 * 7/8 * 32 layers; 4 * 2 * 7/8 copies of 4096 * 2 bytes.

    The copies are also sent in each of the 32 layers.
    """
    setup = scaling.Setup(tokens=1)
    assert scaling.statistics_bytes(scaling.MIXTRAL, setup, 8) == 34 * 4 * 1.75 * 32
    assert scaling.all_to_all_bytes(scaling.MIXTRAL, setup) == 7 * 4096 * 2 * 32
    assert (scaling.ring_steps(8), scaling.tree_steps(8), scaling.tree_steps(1024)) == (14, 6, 20)


@pytest.mark.parametrize("flags", [["--expert-parallel", "3"], ["--tokens", "0"]])
def test_an_invalid_setup_is_refused_in_a_sentence(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(["statistics", *flags])
    assert end.value.code == 2
    assert f"error: {flags[0]} {flags[1]}" in capsys.readouterr().err.replace(" is ", " ")
