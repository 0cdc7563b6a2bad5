# SPDX-License-Identifier: Apache-2.0
"""Grids for the tests of the study, and the way to its programs, which are no package."""

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("study", "emoji_tiny", "smollm2_moe")]

import grid

CHOSEN = {model: {"smar": {"smar-coeff": 1, "lr": 0.1}} for model in ("large", "small")}


def content(**changes: object) -> dict:
    found = {
        "data": {},
        "common": {},
        "stages": {"stage2": {"train-iters": 2}},
        "models": {"large": {}, "small": {"num-experts": 16}},
        "arms": {"none": {"modality-routing": "none"}, "smar": {"modality-routing": "smar"}},
        "tuning": {"seeds": [101], "runs": {"large": {"none": {}, "smar": {"smar-coeff": [0.1, 1], "lr": [0.1]}}}},
        "main": {"runs": {"large": {"none": 2, "smar": 1}}, "chosen": CHOSEN},
    }
    if "main" in changes:
        changes["main"] = {"chosen": CHOSEN} | dict(changes["main"])
    return found | changes


def read(tmp_path: Path, **changes: object) -> grid.Grid:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return grid.read_grid(file)
