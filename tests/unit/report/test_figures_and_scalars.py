# SPDX-License-Identifier: Apache-2.0
"""The parts of every report: scalars read from event files, figures, the formatting of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_smar.report import figures
from megatron_smar.report.numbers import duration
from megatron_smar.report.scalars import read_scalars
from megatron_smar.report.style import MAX_POINTS, thin


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.04, "5.0 s"), (59.99, "1 min 00 s"), (245.2, "4 min 05 s"), (7260, "2 h 01 min"), (None, "-")],
)
def test_durations_are_formatted(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_thinning_moves_no_point_off_its_line() -> None:
    x, y = thin(range(1, 1001), range(1, 1001))
    assert len(x) <= MAX_POINTS
    np.testing.assert_array_equal(x, y)
    assert x[0] == 5 and x[-1] == 1000


def test_heat_map_embeds_one_pixel_per_cell() -> None:
    share = np.full((3, 5), 0.2)
    figure = figures.expert_heat_maps(share, share, 0.5)
    sizes = [axes.images[0].get_size() for axes in figure.axes if axes.images]
    assert sizes == [(3, 5), (3, 5)]
    assert len({axes.images[0].get_clim() for axes in figure.axes if axes.images}) == 1


def test_later_run_wins_where_both_logged_a_step(tmp_path: Path) -> None:
    for suffix, steps, value in ((".1", range(1, 7), 1.0), (".2", range(4, 9), 2.0)):
        with SummaryWriter(tmp_path / suffix) as writer:
            for step in steps:
                writer.add_scalar("lm loss", value, step)
                writer.add_scalar(f"only{suffix}", step, step)
        (file,) = (tmp_path / suffix).iterdir()
        # Times of different length: as text, 999 would come after 1000.
        file.rename(tmp_path / f"events.out.tfevents.{ {'.1': 999, '.2': 1000}[suffix] }.host.0.0")
    scalars = read_scalars(tmp_path)
    assert scalars["lm loss"].steps == list(range(1, 9))
    assert scalars["lm loss"].values == [1.0] * 3 + [2.0] * 5
    assert scalars["only.1"].steps == list(range(1, 7))


def test_every_step_of_a_long_run_is_read(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in range(12_000):
            writer.add_scalar("lm loss", step, step)
    assert read_scalars(tmp_path)["lm loss"].values == list(range(12_000))


@pytest.mark.parametrize(
    ("name", "sentence"), [("absent", "is not a folder"), ("", "holds no TensorBoard event files")]
)
def test_a_folder_without_event_files_is_refused_in_one_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_scalars(tmp_path / name)
