# SPDX-License-Identifier: Apache-2.0
"""The C++ packer: limits, order, ties, errors; the same packs as the plain Python version in its benchmark."""

import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_smar.data
from benchmarks import packing as benchmark
from megatron_smar.data.packing import MOST_TOKENS, pack, pack_flat


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Arguments of `pack`, with small numbers, so that ties and full packs are frequent."""
    max_tokens = draw(st.integers(1, 40))
    max_tiles = draw(st.none() | st.integers(0, 6))
    tile_counts = st.integers(0, 6 if max_tiles is None else max_tiles)
    samples = draw(st.lists(st.tuples(st.integers(1, max_tokens), tile_counts), max_size=60))
    return {
        "tokens": [tokens for tokens, _ in samples],
        "tiles": [tiles for _, tiles in samples],
        "max_tokens": max_tokens,
        "max_tiles": max_tiles,
        "window": draw(st.none() | st.integers(1, 70)),
    }


@given(problems())
def test_packs_equal_those_of_the_plain_python_version(problem):
    assert pack(**problem) == benchmark.pack_python(**problem)


@given(problems())
def test_every_sample_is_packed_once_in_order_within_both_limits_and_its_window(problem):
    packs = pack(**problem)
    assert sorted(index for one in packs for index in one) == list(range(len(problem["tokens"])))
    assert packs == sorted(sorted(one) for one in packs)
    window = problem["window"] or len(problem["tokens"])
    for one in packs:
        assert sum(problem["tokens"][index] for index in one) <= problem["max_tokens"]
        assert problem["max_tiles"] is None or sum(problem["tiles"][index] for index in one) <= problem["max_tiles"]
        assert len({index // window for index in one}) == 1


def test_large_inputs_with_tiles_are_packed_as_the_plain_python_version_does():
    tokens, tiles = benchmark.draw(20_000, "llava")
    for max_tiles, window in ((None, None), (5, None), (5, 3000), (None, 1)):
        arguments = (tokens.tolist(), tiles.tolist(), 4096, max_tiles, window)
        assert pack(*arguments) == benchmark.pack_python(*arguments)


def test_a_sample_goes_into_the_pack_with_the_least_token_room():
    assert pack([7, 6, 3], [0, 0, 0], 10) == [[0, 2], [1]]


def test_ties_in_token_room_go_to_the_least_tile_room():
    assert pack([6, 6, 3, 3], [0, 2, 0, 2], 9, max_tiles=4) == [[0, 3], [1, 2]]


def test_ties_between_packs_go_to_the_last_changed():
    assert pack([6, 6, 6, 3], [0, 0, 0, 0], 9) == [[0], [1], [2, 3]]


def test_a_pack_without_room_for_tiles_is_skipped():
    assert pack([6, 5, 3], [2, 1, 1], 10, max_tiles=2) == [[0], [1, 2]]


def test_lists_of_packs_and_flat_arrays_agree():
    order, offsets = pack_flat([5, 3, 4, 2, 1], [1, 0, 1, 0, 0], 6, 1)
    assert [order[a:b].tolist() for a, b in pairwise(offsets)] == [[0, 4], [1], [2, 3]]


def test_nothing_to_pack_gives_no_packs():
    assert pack([], [], 10) == []
    order, offsets = pack_flat(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), 10)
    assert order.tolist() == [] and offsets.tolist() == [0]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_arrays_of_any_integer_type_and_stride_give_the_same_packs(dtype):
    tokens, tiles = [5, 3, 4, 2, 1], [1, 0, 1, 0, 0]
    strided = np.repeat(np.array(tokens, dtype=dtype), 2)[::2]
    assert pack(strided, np.array(tiles, dtype=dtype), 6, 1) == pack(tokens, tiles, 6, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 9], [0, 0], 8), "Sample 1 has 9 tokens, but a pack takes samples of 1 to 8"),
        (([3, 0], [0, 0], 8), "Sample 1 has 0 tokens"),
        (([3, 3], [0, 3], 8, 2), "Sample 1 has 3 tiles, but a pack takes samples of 0 to 2"),
        (([3, 3], [0, -1], 8), "Sample 1 has -1 tiles"),
        (([3.5], [0], 8), "tokens has shape (1,) and type float64"),
        (([[3]], [[0]], 8), "tokens has shape (1, 1)"),
        (([3, 3], [0], 8), "tokens has 2 samples, but tiles has 1"),
        (([3], [0], 0), "max_tokens 0 holds no sample"),
        (([3], [0], 8, None, 0), "window 0 holds no sample"),
        (([3], [0], 8, -1), "max_tiles -1 is below 0"),
        (([3], [0], MOST_TOKENS + 1), f"max_tokens {MOST_TOKENS + 1} is more than packing has tables for"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        pack(*arguments)
    assert message in str(caught.value)


def test_a_missing_build_is_reported_with_its_fix(monkeypatch):
    monkeypatch.delattr(megatron_smar.data, "_packing", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_smar.data._packing", None)  # how Python marks a missing module
    with pytest.raises(ImportError, match=r"packer is not built .*: reinstall megatron_smar with a C\+\+17 compiler"):
        pack([1], [0], 8)


def test_other_threads_run_while_the_packer_works():
    tokens, tiles = benchmark.draw(1_000_000, "llava")
    packing = threading.Thread(target=pack_flat, args=(tokens, tiles, 4096))
    turns = [time.perf_counter()]
    packing.start()
    while packing.is_alive():
        turns.append(time.perf_counter())
    longest_wait = max(after - before for before, after in pairwise(turns))
    assert longest_wait < 0.5 * (turns[-1] - turns[0])  # holding the GIL would make one long wait


def test_a_buffer_of_4000_samples_fills_packs_to_99_percent():
    tokens, tiles = benchmark.draw(40_000, "llava")
    packs = len(pack_flat(tokens, tiles, 16384, window=4000)[1]) - 1
    assert benchmark.fill_of(tokens, packs, 16384) >= 0.99


def test_packs_are_as_full_as_those_of_the_knapsack():
    tokens, _ = benchmark.draw(8_000, "tile")
    knapsack = benchmark.pack_knapsack(benchmark.greedy_knapsack, tokens.tolist(), 8192, 4000)
    assert sorted(index for one in knapsack for index in one) == list(range(8_000))
    assert len(pack(tokens, np.zeros_like(tokens), 8192, window=4000)) <= len(knapsack)


def test_the_reconstructed_mixture_is_deterministic_and_has_the_right_share_of_images():
    tokens, tiles = benchmark.draw(20_000, "tile")
    again, _ = benchmark.draw(20_000, "tile")
    assert np.array_equal(tokens, again)
    text = tiles == 0
    assert 0.06 * 0.9 < text.mean() < 0.06 * 1.1  # ShareGPT's share, 40 of 664
    assert tokens[text].max() == benchmark.LONGEST_TEXT and tokens[~text].min() > 256


def test_a_folder_without_megatrons_knapsack_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a Megatron-LM checkout"):
        benchmark.load_knapsack(tmp_path)
