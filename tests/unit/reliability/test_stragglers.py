# SPDX-License-Identifier: Apache-2.0
"""A rank that stands out is named, and only such a rank."""

import pytest

from megatron_smar.reliability.stragglers import slow_ranks


@pytest.mark.parametrize(
    ("times", "stages", "said"),
    [
        ({"the data loader": [1, 1], "the pass": [100, 131]}, [0, 0], ["rank 1 is slow in the pass: 131.0 ms"]),
        ({"the data loader": [1, 1], "the pass": [100, 129]}, [0, 0], []),
        # Milliseconds that nobody would miss are left out, even if they are a multiple.
        ({"the data loader": [4, 1], "the pass": [100, 100]}, [0, 0], []),
        ({"the data loader": [40, 0], "the pass": [100, 100]}, [0, 0], ["rank 0 is slow in the data loader: 40.0 ms"]),
        # The first stage has the vision encoder: it is compared with itself alone.
        ({"the data loader": [1, 1, 1, 1], "the pass": [200, 200, 100, 100]}, [0, 0, 1, 1], []),
        ({"the pass": [200, 200, 100, 150]}, [0, 0, 1, 1], ["rank 3 is slow in the pass: 150.0 ms"]),
        ({"the pass": [200]}, [0], []),
        (
            {"the pass": [100, 100, 100, 100, 300]},
            [0] * 5,
            ["rank 4 is slow in the pass: 300.0 ms per step, 3.0"],
        ),
    ],
)
def test_a_rank_is_named_where_it_stands_out_among_ranks_with_the_same_work(times, stages, said):
    lines = list(slow_ranks(times, stages))
    assert len(lines) == len(said) and all(line.startswith(begin) for line, begin in zip(lines, said, strict=True))
