# SPDX-License-Identifier: Apache-2.0
"""Counts where the host waits for the device in a training step, by source line."""

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
    """The step `waits`: one training step of a model with two layers, in bf16, after three steps of warm-up."""
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
    # Megatron would read the loss once per micro-batch to check for NaN; the benchmark's flags disable that.
    findings.at_most("ours", sum(ours.values()), 0)
    findings.require(not ours, ", ".join(f"{line} waits {number}x" for line, number in ours.items()))


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts torch's warnings of a synchronization, by `file:line` of the innermost caller outside torch."""
    lines: Counter[str] = Counter()

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if _SAID in str(message):
            lines[_caller()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield lines


def is_ours(line: str) -> bool:
    """Returns whether a `file:line` is in this project's package."""
    return Path(line.rpartition(":")[0]).is_relative_to(_OURS)


def _caller() -> str:
    """Returns the innermost frame that is not in torch, this file or Python's warnings module.

    torch reports a wait within a backward pass when the pass is over: its line is unknown, and the line that started
    the pass is returned, with a mark.
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
