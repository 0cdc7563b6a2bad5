# SPDX-License-Identifier: Apache-2.0
"""Counting and reporting rejected samples, and when they end a run."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.data.rejects import FEWEST_JUDGED, DataError, RejectLog, SampleError, read_rejects
from tools.data.rejects import main

BAD = SampleError("bad_image", "it is cut off")


def read(log: RejectLog, outcomes: list[bool]) -> int:
    """Feeds a log with good and bad samples; returns how many it accepted before it stopped, or all."""
    for number, good in enumerate(outcomes):
        if good:
            log.accept()
            continue
        try:
            log.add(f"sample{number}", BAD)
        except DataError:
            return number + 1
    return len(outcomes)


def log(**changes) -> RejectLog:
    return RejectLog("train-rank000", "SHARDS", **({"announce": False} | changes))


def test_too_many_rejects_end_the_run_with_the_table() -> None:
    rejects = log(max_skip_ratio=0.1)
    for _ in range(90):
        rejects.accept()
    for number in range(14):
        rejects.add(f"b{number}", BAD)
    rejects.add("long", SampleError("too_long", "5000 positions"))
    with pytest.raises(DataError) as error:
        for number in range(20):
            rejects.add(f"c{number}", BAD)
    sentence, *table = str(error.value).splitlines()
    assert sentence == (
        "18.9% of the first 111 samples that a worker read from SHARDS were rejected and --max-skip-ratio is 0.1: fix "
        "the data, or the settings it was rejected for, or raise it."
    )
    assert [line.split() for line in table] == [
        ["reason", "samples", "share", "for", "example"],
        ["bad_image", "20", "18.02%", "b0"],
        ["too_long", "1", "0.90%", "long"],
    ]


@given(
    ratio=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    outcomes=st.lists(st.booleans(), min_size=3 * FEWEST_JUDGED, max_size=3 * FEWEST_JUDGED),
    good=st.integers(0, 9),
)
def test_a_run_stops_at_the_first_reject_beyond_the_margin(ratio: float, outcomes: list[bool], good: int) -> None:
    outcomes = [outcome or number % 10 < good for number, outcome in enumerate(outcomes)]
    expected = len(outcomes)
    for total in range(FEWEST_JUDGED, len(outcomes) + 1):
        rejected = outcomes[:total].count(False)
        spare = 3 * math.sqrt(total * ratio * (1 - ratio))
        if not outcomes[total - 1] and rejected > total * ratio + spare + 1e-9:
            expected = total
            break
    assert read(log(max_skip_ratio=ratio), outcomes) == expected


def test_a_few_bad_samples_at_the_start_do_not_end_a_run() -> None:
    assert read(log(max_skip_ratio=0.1), [False] * (FEWEST_JUDGED - 1)) == FEWEST_JUDGED - 1
    assert read(log(max_skip_ratio=0.1), [False] * 18 + [True] * 500) == 518


def test_a_ratio_of_one_only_ends_at_a_row_of_rejects() -> None:
    assert read(log(max_skip_ratio=1.0, limit=50), ([False] * 49 + [True]) * 10) == 500
    assert read(log(max_skip_ratio=1.0, limit=50), [True, *[False] * 60]) == 51


def test_samples_that_fail_when_their_images_are_decoded_count_once_and_as_rejects() -> None:
    rejects = log(max_skip_ratio=0.1)
    with pytest.raises(DataError, match=r"100\.0% of the first 100 samples"):
        for number in range(FEWEST_JUDGED):
            rejects.accept()
            rejects.add(f"sample{number}", BAD, late=True)


def test_damaged_images_end_the_run_even_with_good_records() -> None:
    rejects = log(limit=20)
    with pytest.raises(DataError, match="last 20 samples in a row from SHARDS"):
        for number in range(20):
            rejects.accept()
            rejects.add(f"sample{number}", BAD, late=True)


def test_a_decoded_image_ends_a_row_of_damaged_images() -> None:
    rejects = log(limit=2)
    for _ in range(5):
        rejects.add("bad", BAD, late=True)
        rejects.accept(late=True)


def test_silent_ranks_stop_at_the_same_sample() -> None:
    outcomes = [number % 3 > 0 for number in range(300)]
    assert read(log(max_skip_ratio=0.1, announce=True), outcomes) == read(log(max_skip_ratio=0.1), outcomes) < 300


@pytest.mark.parametrize("key", ["../\udce9/a", "\x1b[31mred", "line\u2028break", "日本"])
def test_control_characters_in_keys_are_escaped(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RejectLog("train-rank000", "SHARDS", directory=tmp_path).add(key, BAD)
    shown = capsys.readouterr().err.removesuffix("\n")
    assert shown.isprintable() and shown.endswith("bad_image: it is cut off")
    (line,) = (tmp_path / "train-rank000-worker00.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line) == {"key": key, "reason": "bad_image", "message": "it is cut off"}
    assert read_rejects(tmp_path) == {"bad_image": 1}


def test_the_table_of_a_run_is_printed_split_by_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, keys in (("train-rank000", "abc"), ("train-rank001", "cd"), ("valid-rank000", "a")):
        rejects = RejectLog(name, "SHARDS", directory=tmp_path)
        for key in keys:
            rejects.add(key, BAD if key < "c" else SampleError("too_long", "much"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["rejects", str(tmp_path)])
    main()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["train:", "4", "samples", "skipped"],
        ["reason", "samples", "for", "example"],
        ["bad_image", "2", "a"],
        ["too_long", "2", "c"],
        ["valid:", "1", "samples", "skipped"],
        ["reason", "samples", "for", "example"],
        ["bad_image", "1", "a"],
    ]


def test_a_missing_folder_of_rejects_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rejects", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "none is not a folder: give a run's --rejects-dir" in capsys.readouterr().err
