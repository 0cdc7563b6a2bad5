# SPDX-License-Identifier: Apache-2.0
"""The input and the output of a step."""

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
    """Device and settings of a step; only this class knows which device is meant.

    Attributes:
        device: `cuda`, or `cpu` to test this program itself, which proves nothing about a GPU.
        quick: Whether to use the smallest shapes and few repetitions.
        ranks: Number of GPUs (processes) for runs on several GPUs.
        factor: Factor of every tolerance.
        folder: The step's own folder.
        files: Folder of the step `files`, with shards, images, tokenizer and vision tower.
    """

    device: Device
    quick: bool
    ranks: int
    factor: float
    folder: Path
    files: Path

    def save(self, path: Path) -> None:
        """Writes the context for the step's process."""
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Context:
        """Reads a context written by `save`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {name: Path(values[name]) for name in ("folder", "files")})


@dataclass
class Findings:
    """The findings of a step.

    Attributes:
        factor: Factor of every tolerance.
        figures: Measured values by name.
        tolerances: Maximum of a figure, by the figure's name.
        failures: One sentence per failure; empty if the step passed.
    """

    factor: float = 1.0
    figures: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def note(self, name: str, value: Any) -> None:
        """Records a figure without a tolerance."""
        self.figures[name] = value

    def at_most(self, name: str, value: float, tolerance: float) -> None:
        """Records a figure that must not be greater than its tolerance; NaN counts as greater."""
        self.figures[name], self.tolerances[name] = value, tolerance * self.factor
        if not value <= tolerance * self.factor:
            self.failures.append(f"{name} is {value:.3g}, more than {tolerance * self.factor:.3g}")

    def require(self, holds: bool, otherwise: str) -> None:
        """Records the failure `otherwise` unless the condition holds."""
        if not holds:
            self.failures.append(otherwise)

    def finite(self, name: str, values: list[float]) -> None:
        """Records a failure unless there are values and all are finite."""
        self.require(bool(values) and all(map(math.isfinite, values)), f"{name}: {values} are not finite numbers")
