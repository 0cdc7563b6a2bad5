# SPDX-License-Identifier: Apache-2.0
"""The formatting of numbers, the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np


def is_number(value: Any) -> bool:
    """Whether a value is a number, or NaN or None for a number that was not measured."""
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return value is not None and is_number(value) and math.isfinite(value)


def percent(value: float | None) -> str:
    """Formats a share, such as 87.3%; "-" if it was not measured."""
    return f"{value:.1%}" if is_finite(value) else "-"


def decimal(value: float | None) -> str:
    """Formats a number with two decimals; "-" if it was not measured."""
    return f"{value:,.2f}" if is_finite(value) else "-"


def duration(seconds: float | None) -> str:
    """Formats seconds, such as 4 min 05 s; "-" if they were not measured."""
    if not is_finite(seconds):
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """Formats a table with a rule under its first row; the columns in `left` are left-aligned, others right-aligned."""
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
    """Converts a value for JSON: null for NaN and infinities, lists for arrays, and the text of anything else."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
