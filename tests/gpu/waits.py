# SPDX-License-Identifier: Apache-2.0
"""Where the host waits for the device in a training step, by line of source."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.gpu.context import ROOT, Context, Findings
from tests.gpu.overhead import WAITS, build

_OURS = ROOT / "megatron_smar"
_BACKWARD = "backward pass of "
_SAID = "synchronizing CUDA operation"


def count(context: Context, findings: Findings) -> None:
    """The step `waits`: one step of a model of two layers, in bf16, after three that compile and allocate."""
    training = build(context, WAITS)
    training.use("smar")
    for _ in range(3):
        training.step()
    torch.cuda.synchronize()
    with waits() as lines:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            torch.ones(1, device=context.device).item()
            noticed = lines.total()
            lines.clear()
            training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    findings.require(noticed > 0, "torch did not report a wait that was there")
    ours = {line: number for line, number in lines.items() if is_ours(line)}
    findings.note("all", lines.total())
    findings.note("in backward passes", sum(n for line, n in lines.items() if line.startswith(_BACKWARD)))
    findings.note("most", ", ".join(f"{line} {number}x" for line, number in lines.most_common(5)))
    # Losses are looked at for NaN once a micro-batch unless it is switched off, and the benchmark's flags do that.
    findings.at_most("ours", sum(ours.values()), 0)
    findings.require(not ours, ", ".join(f"{line} waits {number}x" for line, number in ours.items()))


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts torch's warnings of a synchronisation, by `file:line` of the innermost caller outside of torch."""
    lines: Counter[str] = Counter()

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if _SAID in str(message):
            lines[_caller()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield lines


def is_ours(line: str) -> bool:
    """Whether a `file:line` is in the package."""
    return Path(line.rpartition(":")[0]).is_relative_to(_OURS)


def _caller() -> str:
    """The innermost frame that is neither torch's, this file's nor Python's own.

    What waits within a backward pass is reported by torch when the pass is over: its line is unknown, and the one that
    began the pass is marked.
    """
    inner = (str(Path(torch.__file__).parent), __file__, warnings.__file__)
    within_torch: list[str] = []
    for frame, line in traceback.walk_stack(sys._getframe()):
        name = frame.f_code.co_filename
        if not name.startswith(inner):
            backward = any(file.endswith(("autograd/__init__.py", "autograd/graph.py")) for file in within_torch)
            return f"{_BACKWARD * backward}{name}:{line}"
        within_torch.append(name)
    return "?:0"
