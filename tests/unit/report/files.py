# SPDX-License-Identifier: Apache-2.0
"""Writes the files that the tests of the report read: results as tools/evaluate.py writes them, and event files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


def routing(layers: int = 3, experts: int = 2, distance: float = 1.0) -> dict[str, Any]:
    """Returns the routing of a benchmark; the text tokens of layer 1 use its first expert only."""
    even = [1 / experts] * experts
    first = [1.0] + [0.0] * (experts - 1)
    return {
        "samples": 9,
        "mrd_distance_by_layer": {str(layer): distance for layer in range(1, layers + 1)},
        "expert_share": {
            "text": {str(layer): first if layer == 1 else even for layer in range(1, layers + 1)},
            "vision": {str(layer): even for layer in range(1, layers + 1)},
        },
    }


def benchmark(score: float = 1234.5, asked: int = 10, **changed: Any) -> dict[str, Any]:
    """Returns results on MME."""
    return {
        "title": "MME",
        "version": "release",
        "main_metric": "perception",
        "metrics": {"perception": score, "points/OCR": 77.25},
        "asked": asked,
        "skipped": [{"key": "7", "reason": "its picture is missing"}, {"key": "8", "reason": "its picture is missing"}],
        "routing": routing(),
    } | changed


def task(score: float = 0.5, **changed: Any) -> dict[str, Any]:
    """Returns the result on a task."""
    return {"metric": "acc", "score": score, "stderr": 0.01, "samples": 100, "shots": 5, "version": 1} | changed


def write_results(path: Path, **content: Any) -> Path:
    """Writes a results file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_events(folder: Path, *tags: str) -> Path:
    """Writes scalars of two steps and returns their folder."""
    with SummaryWriter(folder) as writer:
        for tag in tags:
            for step in (1, 2):
                writer.add_scalar(tag, 3 / step, step)
    return folder
