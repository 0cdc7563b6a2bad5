# SPDX-License-Identifier: Apache-2.0
"""Tests of which console messages are silenced and which never are."""

import logging

import pytest

from megatron_smar.runtime import console


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last):",
        "pretrain_vlm.py: error: --lr is missing.",
        "RuntimeError: [1] is setting up NCCL communicator",
        " successfully loaded checkpoint from run [ t 1/1, p 1/1 ] at iteration 4",
        "WARNING: iteration 4: routing collapses: 95.7% of the text tokens choose expert 0",
        "[Rank 0] (after 1 iterations) memory (MB) | allocated: 812.50 | max allocated: 900.00",
        "could not load the checkpoint",
    ],
)
def test_lines_that_are_not_listed_are_written_unchanged(text):
    assert console.written(text) == text


def test_megatrons_table_of_arguments_is_left_out_and_the_lines_after_it_are_not():
    lines = ["-------- arguments --------", "  lr ....... 1", "-------- end of arguments ---------", "after"]
    assert [console.written(line) for line in lines] == [None, None, None, "after"]


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_an_error_passes_the_filter_that_drops_a_warning_with_the_same_text(level):
    record = logging.LogRecord("x", level, __file__, 1, "GPTModel IS DEPRECATED. ...", None, None)
    other = logging.LogRecord("x", level, __file__, 1, "another thing", None, None)
    unlisted = console._Unlisted("GPTModel IS DEPRECATED")
    assert unlisted.filter(record) == (level == logging.ERROR) and unlisted.filter(other)
