# SPDX-License-Identifier: Apache-2.0
"""One run of the study: stage 2 from the checkpoint of its model and seed, and its measures as a JSON file."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backbones import Backbone
from grid import SPLIT_OF, TEXT_SHARE, Run
from pipeline import EVALUATION_CODE, ROOT, TRAINING_CODE
from programs import locked, run_alone
from steps import StepError, source_hash

HERE = Path("examples/study")
STUDY_CODE = [
    *TRAINING_CODE,
    *EVALUATION_CODE,
    "megatron_smar/placement/*.py",
    *(f"{HERE}/{name}.py" for name in ("backbones", "measure", "runs")),
]


@dataclass(frozen=True)
class Study:
    """The runs of a grid, and where their results are.

    Attributes:
        backbone: What the runs start from.
        results: Folder of the results, which are kept.
        provenance: What makes the results: code, packages and device. Read once, since a fork keeps the code that it
            was started with.
    """

    backbone: Backbone
    results: Path
    provenance: Mapping[str, str] = field(default_factory=lambda: provenance())

    def result(self, run: Run) -> dict[str, Any] | None:
        """Returns a run's result; None if there is none, or it has other settings or another start than its seed now.

        A shared stage that is trained again, on another processor or a GPU, may differ in the last bits.
        """
        found = self.backbone.grid.result(run, self.results)
        if found is None or "failed" in found:
            return found
        files = list(self.backbone.folder(run.base).rglob(f"measured_{run.part}_*.json"))
        files = [file for file in files if file.stem.endswith(self.provenance["code"])] or files
        starts = [rounded(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return found if not starts or found["before"] in starts else None

    def run(self, run: Run, retry: bool = False) -> tuple[dict[str, Any], bool]:
        """Does a run unless it is done, and writes its result; a run that fails has a result too, which says so.

        Args:
            run: The run.
            retry: Whether a run that failed is done again.

        Returns:
            The result, and whether the run was done now: another process may have done it.

        Raises:
            StepError: A stage that the run shares with others failed, or measuring the checkpoint before the run.
        """
        folder = self.backbone.folder(run.base) / run.part / run.arm
        with locked(folder.with_name(f"{folder.name}.lock")):  # of several processes that do the study
            earlier = self.result(run)
            if earlier is not None and not (retry and "failed" in earlier):
                return earlier, False
            begin = time.monotonic()
            start = self.backbone.make(run.base)
            before = self._measure(run, start, start / f"measured_{run.part}_{self.provenance['code']}.json")
            result: dict[str, Any]
            try:
                result = {"before": before, "after": self._after(run, folder, start)}
            except StepError as error:
                result = {"failed": str(error)}
            result["seconds"] = round(time.monotonic() - begin, 1)
            self._write(run, result, earlier)
            if "failed" not in result:
                shutil.rmtree(folder)
        return result, True

    def _after(self, run: Run, folder: Path, start: Path) -> dict[str, Any]:
        """Trains a run's stage and returns the measures after it."""
        shutil.rmtree(folder, ignore_errors=True)
        data = "instructions" if run.flags.get(TEXT_SHARE) == 0 else "stage2.yaml"
        self.backbone.train(self.backbone.flags(run.base, run.flags), data, folder, start)
        return self._measure(run, folder, folder / "after.json")

    def _write(self, run: Run, result: dict[str, Any], earlier: Mapping[str, Any] | None) -> None:
        """Adds to a result what made it, and what an earlier attempt said that failed, and writes it."""
        failures = [*earlier.get("earlier_failures", ()), earlier["failed"]] if earlier and "failed" in earlier else []
        result |= {"key": self.backbone.grid.key(run), "flags": dict(run.flags), **self.provenance}
        result |= {"earlier_failures": failures} if failures else {}
        write_json(self.results / f"{run.name}.json", rounded(result))

    def _measure(self, run: Run, trained: Path, output: Path) -> dict[str, Any]:
        """Measures a checkpoint on the run's split; what is measured is not measured again."""
        with locked(output.parent):
            if not output.exists():
                command = [HERE / "measure.py", *self._samples(run), "--load", trained, "--output", output]
                run_alone(list(map(str, command)), output.with_suffix(".log"))
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found

    def _samples(self, run: Run) -> list[object]:
        data, own = self.backbone.data.output, SPLIT_OF[run.part]
        splits = data / "splits"
        (other,) = set(SPLIT_OF.values()) - {own}
        return [
            *["--text", splits / f"{own}_texts.json", "--vqa", splits / f"{own}_questions.json"],
            *["--plan-vqa", splits / f"{other}_questions.json", "--image-root", data / "scenes"],
            *["--conversation-template", self.backbone.template, *self.backbone.measured_with],
        ]


def provenance() -> dict[str, str]:
    """Returns what makes results: the code, the versions of the packages that compute, and the device."""
    packages = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    device = os.environ.get("MEGATRON_SMAR_DEVICE", "cpu")
    return {"code": source_hash(ROOT, STUDY_CODE), "device": device} | packages


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(path)


def rounded(value: Any) -> Any:
    """Returns a result with six significant digits, which are more than the measures have."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
