# SPDX-License-Identifier: Apache-2.0
"""Tests of which tiles move between replicas."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.model.vision_balance import even_shares, moves

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(COUNTS)
def test_ranks_differ_by_more_than_a_tile_after_the_moves_or_lose_one(counts):
    sent = moves(counts)
    after = [
        count - sum(leaving) + sum(row[rank] for row in sent)
        for rank, (count, leaving) in enumerate(zip(counts, sent, strict=True))
    ]
    assert sum(after) == sum(counts) and max(after) - min(after) <= 1
    assert all(0 <= sum(leaving) <= count for leaving, count in zip(sent, counts, strict=True))


@given(COUNTS)
def test_more_tiles_are_sent_than_have_to_be(counts):
    least, more = divmod(sum(counts), len(counts))
    above = sum(max(0, count - least) for count in counts)
    assert sum(map(sum, moves(counts))) == above - min(more, sum(count > least for count in counts))
    assert all(
        not sum(row) or not sum(other[rank] for other in moves(counts)) for rank, row in enumerate(moves(counts))
    )


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 9))
def test_shares_are_uneven_or_do_not_add_up(number, ranks, first):
    shares = even_shares(number, ranks, first)
    assert sum(shares) == number and max(shares) - min(shares) <= 1
    if number % ranks:
        assert shares[first % ranks] == max(shares)
