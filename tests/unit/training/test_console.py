# SPDX-License-Identifier: Apache-2.0
"""The console line of an interval."""

import pytest

from megatron_smar.training.console import duration, step_line

LINE = (
    " [2026-11-25 15:09:50.533650] iteration        3/      63 | consumed samples:           24 | elapsed time per "
    "iteration (ms): 1500.0 | learning rate: 1.000000E-02 | global batch size:     8 | lm loss: 5.361396E+00 | "
    "mrd distance: 3.3347 | loss scale: {scale} | grad norm: 2.776 | number of skipped iterations: {skipped:3d} | "
    "number of nan iterations:   0 |"
)


def test_a_steps_line_has_the_losses_and_the_remaining_time():
    line = step_line(LINE.format(scale="1.0", skipped=0))
    assert line.startswith(" [15:09:50] iteration        3/      63 | consumed samples: 24 | ")
    assert " lm loss: 5.361396E+00 |" in line and line.endswith("1500.0 ms/step | ETA 0:01:30 |")
    assert "loss scale" not in line and "skipped" not in line and "nan" not in line


def test_skipped_steps_and_a_loss_scale_are_shown_and_other_lines_are_left_alone():
    line = step_line(LINE.format(scale="65536.0", skipped=2))
    assert "loss scale: 65536.0 |" in line and "number of skipped iterations: 2 |" in line
    assert step_line("saving checkpoint at iteration 3") == "saving checkpoint at iteration 3"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3599.6, "1:00:00"), (90061, "1d 1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text
