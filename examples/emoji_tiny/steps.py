# SPDX-License-Identifier: Apache-2.0
"""Steps of a long run, each with a fingerprint, progress with ETA and a log; steps that are done are skipped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

_BAR = re.compile(r"^\s*(.*?): +\d+%\|.*\| (\d+)/(\d+) \[")
_ERROR = re.compile(r"^(\[rank\d+\]: )?(\S+: )?\w*([Ee]rror|Exception): ")
_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_SHOWN = re.compile(r"(lm loss|smar loss|mrd distance): ([0-9.E+-]+) \|")


class StepError(RuntimeError):
    """A step failed; the message is one sentence for the user."""


def fingerprint(*parts: Any) -> str:
    """Returns a short hash of values that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_hash(root: Path, patterns: Iterable[str]) -> str:
    """Returns a hash of the contents of all files that match the patterns."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return fingerprint([(str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


class Step:
    """One step and the folder with its result.

    Args:
        name: Name of the step, shown to the user.
        folder: Folder of the result. It is removed before the step runs, unless the same step was interrupted in it.
        *key: Values that the result depends on, including the keys of the previous steps.
    """

    def __init__(self, name: str, folder: Path, *key: Any) -> None:
        self.name, self.folder, self.key = name, folder, fingerprint(name, *key)
        self._begun, self._done = folder / ".begun", folder / ".done.json"

    @property
    def seconds(self) -> float:
        """Duration of the step in seconds, from when it was done."""
        return float(json.loads(self._done.read_text())["seconds"])

    def is_done(self) -> bool:
        """Returns whether the folder has the result of this step with this key."""
        return self._done.exists() and json.loads(self._done.read_text())["key"] == self.key

    def run(self, work: Callable[[], None]) -> Step:
        """Does the work unless it is done; the files of a step with another key are removed first."""
        if self.is_done():
            print(f"{self.name}: done before, in {self.seconds:.0f} s", flush=True)
            return self
        if not (self._begun.exists() and self._begun.read_text() == self.key):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begun.write_text(self.key)
        print(f"{self.name} ...", flush=True)
        begin = time.monotonic()
        work()
        self._done.write_text(json.dumps({"key": self.key, "seconds": time.monotonic() - begin}))
        return self


def run_program(command: Sequence[str], log: Path, root: Path, threads: int) -> None:
    """Runs a program and logs its output; training steps are shown as a progress bar with losses and ETA.

    Raises:
        StepError: The program failed.
    """
    environment = os.environ | {
        "MEGATRON_SMAR_DEVICE": os.environ.get("MEGATRON_SMAR_DEVICE", "cpu"),  # two ranks do not share one GPU
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # ranks and data workers share the cores, so waiting threads must not spin
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=60)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        progress = _Progress()
        for line in process.stdout:  # text mode turns a progress bar's carriage returns into line ends
            if progress.show(line):
                continue
            file.write(line)
            file.flush()
            if line.strip():
                last.append(line.rstrip())
        progress.close()
    if process.wait():
        errors = list(dict.fromkeys(line for line in last if _ERROR.search(line)))[-3:]
        print("\n".join(errors), file=sys.stderr)
        raise StepError(f"{log.stem} failed; its output is in {log}.")


class _Progress:
    """A single progress bar for a program's own progress bars or Megatron's line per log interval."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def show(self, line: str) -> bool:
        """Updates the bar from a line of output; returns whether the line was a progress bar, not needed in the log."""
        bar = _BAR.match(line)
        if bar and "Loading weights" in line:  # transformers' bar, which lasts a second
            return True
        if bar:
            self._advance(bar[1].rsplit("]: ", 1)[-1], int(bar[2]), int(bar[3]))
            return True
        step = _ITERATION.search(line)
        if step:
            self._advance("", int(step[1]), int(step[2]))
            assert self._bar is not None
            self._bar.set_postfix_str(", ".join(f"{name} {float(value):.3f}" for name, value in _SHOWN.findall(line)))
        return False

    def _advance(self, name: str, done: int, total: int) -> None:
        if self._bar is None or (self._bar.desc.removesuffix(": "), self._bar.total) != (name, total):
            self.close()
            self._bar = tqdm(total=total, initial=done, desc=name, unit="step", mininterval=2, file=sys.stdout)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
