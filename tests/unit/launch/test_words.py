# SPDX-License-Identifier: Apache-2.0
"""What the launcher reads from a command line."""

from pathlib import Path

from megatron_smar.launch.command import data_paths, folder_of, values, without

WORDS = (
    "p.py",
    "--save",
    "a",
    "--data-path",
    "x",
    "s3://b/y",
    "--valid-data-path=z",
    "--flag",
    "--save=b",
    "--lr",
    "1",
)


def test_a_flag_s_values_are_missed_or_those_of_another_flag():
    assert list(values(WORDS, "--data-path")) == ["x", "s3://b/y"]
    assert folder_of(WORDS, "--save") == Path("b") and folder_of(WORDS, "--load") is None
    assert data_paths(WORDS) == (Path("x"), Path("z"))


def test_a_flag_that_is_taken_out_leaves_its_value_or_takes_another_word():
    kept = ("p.py", "--data-path", "x", "s3://b/y", "--valid-data-path=z", "--flag", "--lr", "1")
    assert without(WORDS, "--save") == kept
    assert without(("--save", "--save"), "--save") == ()
