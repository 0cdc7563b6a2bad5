# SPDX-License-Identifier: Apache-2.0
"""Reads the scalars and images that a run wrote for TensorBoard."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator


class Series(NamedTuple):
    """One logged scalar: `values[i]` at `steps[i]`, with strictly increasing steps. `_asdict()` is its JSON form."""

    steps: list[int]
    values: list[float]


def read_scalars(log_dir: str | Path) -> dict[str, Series]:
    """Returns all scalars in the event files of a folder, by tag.

    A resumed run writes another event file. The files are merged oldest first: where two have the same step, the value
    of the later run is kept, since it belongs to the weights that were trained further.

    Args:
        log_dir: The run's --tensorboard-dir.

    Raises:
        ValueError: `log_dir` is not a folder, or has no event file.
    """
    files = event_files(log_dir)
    merged: dict[str, dict[int, float]] = {}
    for file in files:
        accumulator = _accumulator(file, {SCALARS: 0})  # size 0 keeps every event; the default keeps a sample
        for tag in accumulator.Tags()[SCALARS]:
            merged.setdefault(tag, {}).update((event.step, event.value) for event in accumulator.Scalars(tag))
    return {tag: Series(sorted(points), [points[step] for step in sorted(points)]) for tag, points in merged.items()}


def event_files(log_dir: str | Path) -> list[Path]:
    """Returns the event files of a folder, oldest first.

    Raises:
        ValueError: `log_dir` is not a folder, or has no event file.
    """
    log_dir = Path(log_dir)
    if not log_dir.is_dir():
        raise ValueError(f"{log_dir} is not a folder: give the run's --tensorboard-dir.")
    files = sorted(log_dir.glob("*.tfevents.*"), key=_written_at)
    if not files:
        raise ValueError(f"{log_dir} holds no TensorBoard event files: give the run's own --tensorboard-dir.")
    return files


def read_step_seconds(log_dir: str | Path, tag: str = "lm loss") -> Series:
    """Returns the seconds per step, from the times at which a scalar was logged.

    The first point of each event file is left out, since the time before it includes the program's start.

    Args:
        log_dir: The run's --tensorboard-dir.
        tag: A scalar that is logged at each point.
    """
    points: dict[int, float] = {}
    for file in event_files(log_dir):
        events = _accumulator(file, {SCALARS: 0})
        logged = events.Scalars(tag) if tag in events.Tags()[SCALARS] else []
        for before, event in pairwise(logged):
            if event.step > before.step:
                points[event.step] = (event.wall_time - before.wall_time) / (event.step - before.step)
    return Series(sorted(points), [points[step] for step in sorted(points)])


def read_last_images(log_dir: str | Path, prefix: str) -> dict[str, bytes]:
    """Returns the last image of each tag that begins with `prefix`, as file bytes, by the rest of the tag."""
    found: dict[str, bytes] = {}
    for file in event_files(log_dir):
        events = _accumulator(file, {IMAGES: 1})  # keeps the newest
        for tag in events.Tags()[IMAGES]:
            if tag.startswith(prefix):
                found[tag.removeprefix(prefix)] = events.Images(tag)[-1].encoded_image_string
    return found


def _accumulator(file: Path, sizes: dict[str, int]) -> EventAccumulator:
    # Steps that occur in two files are resolved by the readers, which keep the later run's.
    accumulator = EventAccumulator(str(file), size_guidance=sizes, purge_orphaned_data=False)
    accumulator.Reload()
    return accumulator


def _written_at(file: Path) -> tuple[int, str]:
    """Returns the sort key of an event file: the time in `events.out.tfevents.TIME.HOST.PID.NUMBER`, then the name."""
    time = file.name.partition(".tfevents.")[2].partition(".")[0]
    return (int(time) if time.isdigit() else 0, file.name)
