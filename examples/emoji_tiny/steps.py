# SPDX-License-Identifier: Apache-2.0
"""Steps of a long run, each with a fingerprint, progress with ETA and a log; steps that are done are skipped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_smar.runtime.environment import environment_with_gpus

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
        *key: Settings that the result depends on.
        inputs: The steps whose results this one uses.
        code: Hash of the code that makes the result.
        any_code: Whether a result that other code made, from the same settings, is kept; a line says so.
    """

    def __init__(
        self, name: str, folder: Path, *key: Any, inputs: Sequence[Step] = (), code: str = "", any_code: bool = False
    ) -> None:
        self.name, self.folder, self.inputs, self.any_code = name, folder, inputs, any_code
        self.key: str = fingerprint(name, *key, [step.key for step in inputs])
        self._own_code = code
        self._begun, self._done = folder / ".begun", folder / ".done.json"

    @property
    def code(self) -> str:
        """Hash of the present code and of the code that made the inputs' results."""
        return fingerprint(self._own_code, [step.made_by for step in self.inputs])

    @property
    def made_by(self) -> str:
        """Hash of the code that made the result; of the present code if there is no result yet."""
        return str(self._record()["code"]) if self._done.exists() else self.code

    @property
    def is_current(self) -> bool:
        """Whether the present code made the result and the results that it was made from."""
        return self.made_by == self.code and all(step.is_current for step in self.inputs)

    @property
    def seconds(self) -> float:
        """Duration of the step in seconds, from when it was done, with the parts that were interrupted."""
        return float(self._record()["seconds"])

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the step's programs in seconds, which other programs on the machine change less."""
        return float(self._record()["cpu_seconds"])

    def is_done(self) -> bool:
        """Returns whether the folder has the result of this step with this key, made by this code unless `any_code`."""
        if not self._done.exists() or self._record()["key"] != self.key:
            return False
        return self.any_code or self.made_by == self.code

    def run(self, work: Callable[[], None]) -> Step:
        """Does the work unless it is done; the files of a step with another key or code are removed first."""
        if self.is_done():
            other = "" if self.is_current else " with other code"
            print(f"{self.name}: done before{other}, in {self.seconds:.0f} s", flush=True)
            return self
        spent = self._spent_before()
        if spent is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{self.name} ...", flush=True)
        before, start = spent or (0.0, 0.0), _clocks()
        self._write(before)
        try:
            work()
        finally:
            self._write([sum(parts) - begin for *parts, begin in zip(before, _clocks(), start, strict=True)])
        self._begun.replace(self._done)
        return self

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._done.read_text())
        return record

    def _write(self, spent: Sequence[float]) -> None:
        seconds, cpu_seconds = spent
        record = {"key": self.key, "code": self.code, "seconds": seconds, "cpu_seconds": cpu_seconds}
        self._begun.write_text(json.dumps(record))

    def _spent_before(self) -> tuple[float, float] | None:
        """Returns what the same step spent in this folder before it was interrupted; None if it did not run."""
        if self._done.exists() or not self._begun.exists():
            return None
        begun = json.loads(self._begun.read_text())
        same = (begun["key"], begun["code"]) == (self.key, self.code)
        return (begun["seconds"], begun["cpu_seconds"]) if same else None


def _clocks() -> tuple[float, float]:
    """Returns the time in seconds, and the CPU time of all programs that this one started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), children.ru_utime + children.ru_stime


def run_program(
    command: Sequence[str],
    log: Path,
    root: Path,
    threads: int,
    device: str | None = None,
    shows_progress: bool = True,
) -> None:
    """Runs a program and logs its output; training steps are shown as a progress bar with losses and ETA.

    Args:
        command: The program and its arguments.
        log: File for the output.
        root: Working directory.
        threads: Number of threads of each process.
        device: `cpu` or `cuda`; None for that in the environment, or else the CPU.
        shows_progress: Whether there is a progress bar; without it, training steps are logged.

    Raises:
        StepError: The program failed.
    """
    device = device or os.environ.get("MEGATRON_SMAR_DEVICE", "cpu")  # two ranks do not share one GPU
    environment = (environment_with_gpus() if device == "cuda" else dict(os.environ)) | {
        "MEGATRON_SMAR_DEVICE": device,
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
            if shows_progress and progress.show(line):
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
