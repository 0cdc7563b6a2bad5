# SPDX-License-Identifier: Apache-2.0
"""What a step is given, and what it hands back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Context:
    """Where and how a step runs; the only place that says which device is meant.

    Attributes:
        device: `cuda`; `cpu` tries this program itself and proves nothing about a GPU.
        quick: Smallest shapes and few repetitions.
        ranks: GPUs (processes) for the runs on several.
        factor: Multiplies every tolerance.
        folder: The step's own folder.
        files: What the step `files` made: shards, pictures, tokenizer, vision tower.
    """

    device: Device
    quick: bool
    ranks: int
    factor: float
    folder: Path
    files: Path

    def save(self, path: Path) -> None:
        """Writes it for the step's process."""
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Context:
        """Reads what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {name: Path(values[name]) for name in ("folder", "files")})


@dataclass
class Findings:
    """What a step found.

    Attributes:
        factor: Multiplies every tolerance.
        figures: What was measured, by name.
        tolerances: The most (or, for `at_least`, the least) that a figure may be.
        failures: What is wrong, each in a sentence; none where the step passed.
    """

    factor: float = 1.0
    figures: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def note(self, name: str, value: Any) -> None:
        """Records a figure that has no tolerance."""
        self.figures[name] = value

    def at_most(self, name: str, value: float, tolerance: float) -> None:
        """Records a figure that must not be greater than its tolerance; NaN is."""
        self.figures[name], self.tolerances[name] = value, tolerance * self.factor
        if not value <= tolerance * self.factor:
            self.failures.append(f"{name} is {value:.3g}, more than {tolerance * self.factor:.3g}")

    def require(self, holds: bool, otherwise: str) -> None:
        """Records a failure unless something holds."""
        if not holds:
            self.failures.append(otherwise)

    def finite(self, name: str, values: list[float]) -> None:
        """Records a failure unless there are values and all are finite."""
        self.require(bool(values) and all(map(math.isfinite, values)), f"{name}: {values} are not finite numbers")
