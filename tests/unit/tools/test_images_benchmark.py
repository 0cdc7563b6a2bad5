# SPDX-License-Identifier: Apache-2.0
"""Tests that the image benchmark measures what it says, not how fast anything is."""

from types import ModuleType

import pytest

import benchmarks.images


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The module benchmarks/images.py."""
    return benchmarks.images


def test_all_parts_are_measured_and_this_projects_pixels_are_close_to_pillows(benchmark: ModuleType) -> None:
    files = {name: data for name, data in benchmark.make_pictures().items() if name.startswith("640x480")}
    rows = benchmark.measure_all(files, set(), rounds=2)
    assert {row.part for row in rows} == {"decode", "resize", "tiles"}
    assert {row.picture for row in rows if row.part == "tiles"} == {
        f"{name}, {label}" for name in files for label in ("1 tile", "1..12 tiles")
    }
    assert all(row.max_difference == 0 for row in rows if row.part == "decode" or row.method == "pillow")
    assert {row.max_difference for row in rows if row.part == "tiles" and row.method == "ours"} <= {1, 2}
    tiled = next(row for row in rows if row.picture == "640x480.jpg, 1..12 tiles")
    assert tiled.tiles_per_second == pytest.approx(13 * tiled.images_per_second)  # 4 x 3 and the thumbnail


def test_tiles_equal_those_of_transformers_with_torchvision(benchmark: ModuleType) -> None:
    files = dict(list(benchmark.make_pictures().items())[:2])
    differences = benchmark.differences_from_transformers(files, {"torchvision"})
    assert differences["torchvision"] == 0 and differences["pillow"] <= 2
