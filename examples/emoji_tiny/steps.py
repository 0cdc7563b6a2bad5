# SPDX-License-Identifier: Apache-2.0
"""Steps of a long run: each has a fingerprint, shows progress and ETA, keeps its log, and is not done twice."""

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

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_SHOWN = re.compile(r"(lm loss|smar loss|mrd distance): ([0-9.E+-]+) \|")


class StepError(RuntimeError):
    """A step failed; the message is one sentence for the user."""


def fingerprint(*parts: Any) -> str:
    """A short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_hash(root: Path, patterns: Iterable[str]) -> str:
    """A hash of the contents of all files that match."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return fingerprint([(str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


class Step:
    """One step and the folder that holds its result.

    Args:
        name: Shown to the user.
        folder: Removed when the step must be done again, unless it says that it can go on.
        key: What the result depends on, the keys of the steps before it included.
    """

    def __init__(self, name: str, folder: Path, *key: Any) -> None:
        self.name, self.folder, self.key = name, folder, fingerprint(name, *key)
        self._begun, self._done = folder / ".begun", folder / ".done.json"

    @property
    def seconds(self) -> float:
        """How long the step took when it was done."""
        return float(json.loads(self._done.read_text())["seconds"])

    def is_done(self) -> bool:
        """Whether the folder holds the result of just this step."""
        return self._done.exists() and json.loads(self._done.read_text())["key"] == self.key

    def run(self, work: Callable[[], None]) -> Step:
        """Does the work unless it is done; what a step of another key left behind is removed first."""
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
    """Runs a program with its output in a log; training steps show as a progress bar with losses and ETA.

    Raises:
        StepError: It failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # ranks and data workers share the cores: waiting must not spin
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=15)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        bar: tqdm[Any] | None = None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.strip():
                last.append(line.rstrip())
            bar = _show(line, bar)
        if bar is not None:
            bar.close()
    if process.wait():
        errors = [line for line in last if "error" in line.lower()] or list(last)[-3:]
        print("\n".join(errors), file=sys.stderr)
        raise StepError(f"{Path(command[-1] if len(command) < 3 else log.stem).name} failed; its output is in {log}.")


def _show(line: str, bar: tqdm[Any] | None) -> tqdm[Any] | None:
    found = _ITERATION.search(line)
    if not found:
        return bar
    done, total = int(found[1]), int(found[2])
    if bar is None:
        bar = tqdm(total=total, initial=done, unit="step", mininterval=2, file=sys.stdout)
    bar.update(done - bar.n)
    bar.set_postfix_str(", ".join(f"{name} {float(value):.3f}" for name, value in _SHOWN.findall(line)))
    return bar
