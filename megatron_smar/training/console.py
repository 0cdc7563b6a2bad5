# SPDX-License-Identifier: Apache-2.0
"""A run's console output: a line per interval with the remaining time, and a file with all arguments."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

from megatron_smar.runtime import console

ARGUMENTS = "arguments.txt"
_STEP = re.compile(r"^ \[[\d-]+ (?P<time>[\d:]+)\.\d+\] iteration +(?P<step>\d+)/ *(?P<last>\d+) \|")
_COLUMN = re.compile(r" ([^|:]+): +([^|]+?) \|")
# Number format by column of Megatron's line.
_COLUMNS = {
    "learning rate": "{:.2E}",
    "grad norm": "{:8.3f}",
    "mrd distance": "{:.4f}",
    "msi": "{:.3f}",
}
# Not shown: constant, in another column, or in TensorBoard.
_HIDDEN = {
    "global batch size",
    "elapsed time per iteration (ms)",
    "text-only ratio",
    "fill",
    "data wait",
}
_COUNTS = {"number of skipped iterations", "number of nan iterations"}  # shown only if not 0


def duration(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds, with days if there are any."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:d}:{minute:02d}:{second:02d}"


def step_line(line: str) -> str:
    """Reformats Megatron's line of an interval, with fixed-width columns and the remaining time; keeps other lines.

    `iteration N/ M |` and `name: value |` keep the form that programs parse. Values that never change in a run are left
    out, and numbers of skipped or nan iterations are shown only if they are not 0. Properties of the batches are in
    TensorBoard. With --all-messages all columns are shown.
    """
    found = _STEP.match(line)
    if not found:
        return line
    values = dict(_COLUMN.findall(line[found.end() :]))
    step, last = int(found["step"]), int(found["last"])
    shown = [f" [{found['time']}] iteration {step:8d}/{last:8d}"]
    for name, value in values.items():
        if name in _HIDDEN or (name in _COUNTS and value == "0"):
            continue
        if name == "loss scale" and float(value) == 1:
            continue
        form = _COLUMNS.get(name, "{:.6E}" if "E" in value else "{}")
        text = value if form == "{}" else form.format(float(value))
        shown.append(f"{name}: {text}")
    milliseconds = float(values.get("elapsed time per iteration (ms)", 0))
    shown += [f"{milliseconds:8.1f} ms/step", f"ETA {duration((last - step) * milliseconds / 1000)}"]
    return " | ".join(shown) + " |"


def write_arguments(args: Namespace) -> Path | None:
    """Writes all arguments, in the form in which Megatron prints them, to --save or else to --tensorboard-dir.

    Returns:
        The file; None if the run has neither folder, since nothing is written where nobody asked for it.
    """
    folder = args.save or args.tensorboard_dir
    if not folder:
        return None
    path = Path(folder) / ARGUMENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in sorted(vars(args).items())]
    path.write_text("\n".join([" ".join(sys.argv), *lines]) + "\n", encoding="utf-8")
    return path


def show_step_lines() -> None:
    """Makes the lines of Megatron's training loop pass through `step_line`."""
    if step_line not in console.rewrite:
        console.rewrite.append(step_line)
