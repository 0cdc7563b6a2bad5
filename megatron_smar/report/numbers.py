# SPDX-License-Identifier: Apache-2.0
"""How numbers are written: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np


def is_number(value: Any) -> bool:
    """Whether it is a number, or NaN or None for one that was not measured."""
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be shown."""
    return value is not None and is_number(value) and math.isfinite(value)


def percent(value: float | None) -> str:
    """A share, such as 87.3%; "-" where there is none."""
    return f"{value:.1%}" if is_finite(value) else "-"


def decimal(value: float | None) -> str:
    """A number with two decimals; "-" where there is none."""
    return f"{value:,.2f}" if is_finite(value) else "-"


def duration(seconds: float | None) -> str:
    """Seconds, such as 4 min 05 s; "-" where there are none."""
    if not is_finite(seconds):
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """A table with a rule under its first row; the columns in `left` are aligned there, numbers at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def plain(value: Any) -> Any:
    """What JSON can hold: null for NaN and infinities, lists for arrays, and the text of anything else."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
