# SPDX-License-Identifier: Apache-2.0
"""Scalars that a run wrote for TensorBoard, read back as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator


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
    log_dir = Path(log_dir)
    if not log_dir.is_dir():
        raise ValueError(f"{log_dir} is not a folder: give the one that the run had as --tensorboard-dir.")
    files = sorted(log_dir.glob("*.tfevents.*"), key=_written_at)
    if not files:
        raise ValueError(f"{log_dir} holds no TensorBoard event files: give the run's own --tensorboard-dir.")
    merged: dict[str, dict[int, float]] = {}
    for file in files:
        # Size 0 keeps every event (the default thins them out); orphans are settled here, by the rule above.
        accumulator = EventAccumulator(str(file), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
        accumulator.Reload()
        for tag in accumulator.Tags()[SCALARS]:
            merged.setdefault(tag, {}).update((event.step, event.value) for event in accumulator.Scalars(tag))
    return {tag: Series(sorted(points), [points[step] for step in sorted(points)]) for tag, points in merged.items()}


def _written_at(file: Path) -> tuple[int, str]:
    """Order of event files: the time in `events.out.tfevents.TIME.HOST.PID.NUMBER`, then the name."""
    time = file.name.partition(".tfevents.")[2].partition(".")[0]
    return (int(time) if time.isdigit() else 0, file.name)
