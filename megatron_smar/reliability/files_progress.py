# SPDX-License-Identifier: Apache-2.0
"""How many bytes this process and its children have read and written, which Linux counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def moved_bytes() -> int:
    """Returns the bytes read and written so far by this process and the processes it has started that still run."""
    return sum(map(_bytes_of, _family(os.getpid())))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # the process or its thread has ended
        return
    for child in children:
        yield from _family(child)


def _bytes_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["wchar"])
