# SPDX-License-Identifier: Apache-2.0
"""Scalars that a run wrote for TensorBoard, read back as plain numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator


class Series(NamedTuple):
    """One logged scalar: `values[i]` at `steps[i]`, steps strictly increasing. `_asdict()` gives its JSON form."""

    steps: list[int]
    values: list[float]


def read_scalars(log_dir: str | Path) -> dict[str, Series]:
    """All scalars in the event files of a folder, by tag.

    A resumed run writes a further event file. They are merged oldest first, so that the later run wins where both have
    a step: what it logged belongs to the weights that live on.

    Args:
        log_dir: What Megatron was given as --tensorboard-dir.

    Raises:
        ValueError: `log_dir` is no folder, or holds no event file.
    """
    files = event_files(log_dir)
    merged: dict[str, dict[int, float]] = {}
    for file in files:
        accumulator = _accumulator(file, {SCALARS: 0})  # size 0 keeps every event; the default thins them out
        for tag in accumulator.Tags()[SCALARS]:
            merged.setdefault(tag, {}).update((event.step, event.value) for event in accumulator.Scalars(tag))
    return {tag: Series(sorted(points), [points[step] for step in sorted(points)]) for tag, points in merged.items()}


def event_files(log_dir: str | Path) -> list[Path]:
    """The event files of a folder, oldest first.

    Raises:
        ValueError: `log_dir` is no folder, or holds no event file.
    """
    log_dir = Path(log_dir)
    if not log_dir.is_dir():
        raise ValueError(f"{log_dir} is not a folder: give the one that the run had as --tensorboard-dir.")
    files = sorted(log_dir.glob("*.tfevents.*"), key=_written_at)
    if not files:
        raise ValueError(f"{log_dir} holds no TensorBoard event files: give the run's own --tensorboard-dir.")
    return files


def read_step_seconds(log_dir: str | Path, tag: str = "lm loss") -> Series:
    """Seconds per step, from the times at which a scalar was logged.

    The first point of each event file has none: what came before it was a start, not a step.

    Args:
        log_dir: As for `read_scalars`.
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
    """The last image of each tag that begins with `prefix`, as its file's bytes, by what follows the prefix."""
    found: dict[str, bytes] = {}
    for file in event_files(log_dir):
        events = _accumulator(file, {IMAGES: 1})  # keeps the newest
        for tag in events.Tags()[IMAGES]:
            if tag.startswith(prefix):
                found[tag.removeprefix(prefix)] = events.Images(tag)[-1].encoded_image_string
    return found


def _accumulator(file: Path, sizes: dict[str, int]) -> EventAccumulator:
    # Orphans are settled by the readers, which let the later run win.
    accumulator = EventAccumulator(str(file), size_guidance=sizes, purge_orphaned_data=False)
    accumulator.Reload()
    return accumulator


def _written_at(file: Path) -> tuple[int, str]:
    """Order of event files: the time in `events.out.tfevents.TIME.HOST.PID.NUMBER`, then the name."""
    time = file.name.partition(".tfevents.")[2].partition(".")[0]
    return (int(time) if time.isdigit() else 0, file.name)
