# SPDX-License-Identifier: Apache-2.0
"""One run of the study: stages 0 and 1 of its seed, which all arms share, stage 2, and its measures as a JSON file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grid import SPLIT_OF, TEXT_SHARE, Base, Grid, Run
from pipeline import EVALUATION_CODE, ROOT, SCRIPTS, TRAINING_CODE
from programs import run_alone
from stages import Demo
from steps import Step, StepError, source_hash
from variants import settings, words

HERE = Path("examples/study")
STUDY_CODE = [
    *TRAINING_CODE,
    *EVALUATION_CODE,
    "megatron_smar/placement/*.py",
    *(f"{HERE}/{name}.py" for name in ("runs", "measure")),
]


class Data(Demo):
    """The demo's data and vision encoder, with more held out, and the held-out part in two halves."""

    def __init__(self, output: Path, cache: Path, options: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(output, cache, any_code=True)
        self._options = options

    def added(self, step: str) -> dict[str, Any]:
        """Returns the grid's options of a step's program."""
        return dict(self._options.get(step, {}))

    def prepare(self) -> None:
        """Makes all that runs share."""
        self.prepare_data()
        self.pretrain_vision()
        self.step("splits", code="", inputs=("corpus", "scenes")).run(self._split)

    def _split(self) -> None:
        corpus, scenes = self.output / "corpus", self.output / "scenes"
        lines = (corpus / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        items = json.loads((scenes / "vqa_held_out.json").read_text(encoding="utf-8"))
        texts, questions = split_texts([json.loads(line) for line in lines]), split_questions(items)
        for name in SPLIT_OF.values():
            for file, records in ((f"{name}_texts.json", texts[name]), (f"{name}_questions.json", questions[name])):
                content = json.dumps(records, ensure_ascii=False, indent=0)
                (self.output / "splits" / file).write_text(content, encoding="utf-8")


def split_texts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Splits held-out passages by document, whose name is a hash, so that no document is on both sides."""
    sides: dict[str, list[Mapping[str, Any]]] = {name: [] for name in SPLIT_OF.values()}
    for record in records:
        sides[list(sides)[int(record["document"], 16) % 2]].append(record)
    return sides


def split_questions(items: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Splits held-out questions by picture; a question about a picture of each side is left out."""
    pictures = sorted({picture for item in items for picture in item["image"]})
    half = set(pictures[: len(pictures) // 2])
    validation, test = SPLIT_OF.values()
    return {
        validation: [item for item in items if half.issuperset(item["image"])],
        test: [item for item in items if half.isdisjoint(item["image"])],
    }


@dataclass(frozen=True)
class Study:
    """Where the study's runs and results are.

    Attributes:
        grid: The grid.
        data: The data that all runs share.
        work: Folder of checkpoints and logs, which can be deleted.
        results: Folder of the results, which are kept.
        provenance: What makes the results: code, packages and device. Read once, since a fork keeps the code that it
            was started with.
    """

    grid: Grid
    data: Data
    work: Path
    results: Path
    provenance: Mapping[str, str] = field(default_factory=lambda: provenance())

    def result_file(self, run: Run) -> Path:
        """Returns the file of a run's result."""
        return self.results / f"{run.name}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        """Returns a run's result; None if there is none, or it was made with other settings."""
        file = self.result_file(run)
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if found["key"] == self.grid.key(run) else None

    def base_folder(self, base: Base) -> Path:
        """Returns the folder of the stages that the runs of a model and seed share."""
        model, seed = base
        return self.work / model / f"seed-{seed}"

    def make_base(self, base: Base) -> Path:
        """Trains stages 0 and 1 of a model and seed unless that is done.

        Args:
            base: The model and the seed.

        Returns:
            The folder of stage 1.

        Raises:
            StepError: A stage failed.
        """
        folder = self.base_folder(base)
        made_from = [self.data.steps[name] for name in ("shards", "vision")]
        before: Step | None = None
        with locked(folder):
            for stage, data in (("stage0", "text"), ("stage1", "captions")):
                flags, files = self._flags(stage, base, {}), [settings(file) for file in _files(stage)]
                inputs = [*made_from, *([before] if before else [])]
                step = Step(stage, folder / stage, files, flags, inputs=inputs, any_code=True)
                start = before.folder if before else None
                if not step.is_done():
                    step.run(partial(self._train, flags, data, step.folder, start))
                before = step
        assert before is not None
        return before.folder

    def run(self, run: Run, retry: bool = False) -> dict[str, Any]:
        """Does a run unless it is done, and writes its result; a run that fails has a result too, which says so.

        Args:
            run: The run.
            retry: Whether a run that failed is done again.
        """
        folder = self.base_folder(run.base) / run.part / run.arm
        with locked(folder.with_name(f"{folder.name}.lock")):  # of several processes that do the study
            earlier = self.result(run)
            if earlier is not None and not (retry and "failed" in earlier):
                return earlier
            begin = time.monotonic()
            try:
                result: dict[str, Any] = self._do(run, folder)
            except StepError as error:
                return self.fail(run, str(error))
            result["seconds"] = round(time.monotonic() - begin, 1)
            self._write(run, result, earlier)
            shutil.rmtree(folder)
        return result

    def fail(self, run: Run, reason: str) -> dict[str, Any]:
        """Writes the result of a run that failed, and returns it."""
        result = {"failed": reason}
        self._write(run, result, self.result(run))
        return result

    def _do(self, run: Run, folder: Path) -> dict[str, Any]:
        stage1 = self.make_base(run.base)
        before = self._measure(run, stage1, stage1 / f"measured_{run.part}_{self.provenance['code']}.json")
        shutil.rmtree(folder, ignore_errors=True)
        self._train(self._flags("stage2", run.base, run.flags), self._mixture(run), folder, stage1)
        return {"before": before, "after": self._measure(run, folder, folder / "after.json")}

    def _write(self, run: Run, result: dict[str, Any], earlier: Mapping[str, Any] | None) -> None:
        """Adds to a result what made it, and what an earlier attempt said that failed, and writes it."""
        failures = [*earlier.get("earlier_failures", ()), earlier["failed"]] if earlier and "failed" in earlier else []
        result |= {"key": self.grid.key(run), "flags": dict(run.flags), **self.provenance}
        result |= {"earlier_failures": failures} if failures else {}
        write_json(self.result_file(run), rounded(result))

    def _flags(self, stage: str, base: tuple[str, int], own: Mapping[str, Any]) -> list[str]:
        model, seed = base
        files = [str(SCRIPTS / f"{file}.yaml") for file in _files(stage)]
        given = {**self.grid.common, **self.grid.models[model], **self.grid.stages.get(stage, {}), **own, "seed": seed}
        share = given.pop(TEXT_SHARE, None)
        given |= {"text-only-ratio": share} if share else {}
        data = self.data.output
        paths = ["--vision-model", data / "vision", "--tokenizer-model", data / "corpus/tokenizer.model"]
        return ["--config", *files, *map(str, paths), *words(given)]

    def _mixture(self, run: Run) -> str:
        """Returns the data of stage 2: without pure text if that is asked for."""
        return "instructions" if run.flags.get(TEXT_SHARE) == 0 else "stage2.yaml"

    def _train(self, flags: list[str], data: str, folder: Path, start: Path | None) -> None:
        paths = ["--data-path", self.data.output / "shards" / data, "--save", folder]
        paths += ["--load", start, "--finetune"] if start else []
        run_alone(["pretrain_vlm.py", *flags, *map(str, paths)], folder.with_name(f"{folder.name}.log"))

    def _measure(self, run: Run, trained: Path, output: Path) -> dict[str, Any]:
        """Measures a checkpoint on the run's split; what is measured is not measured again."""
        with locked(output.parent):
            if not output.exists():
                command = [HERE / "measure.py", *self._samples(run), "--load", trained, "--output", output]
                run_alone(list(map(str, command)), output.with_suffix(".log"))
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found

    def _samples(self, run: Run) -> list[object]:
        splits, own = self.data.output / "splits", SPLIT_OF[run.part]
        (other,) = set(SPLIT_OF.values()) - {own}
        return [
            *["--text", splits / f"{own}_texts.json", "--vqa", splits / f"{own}_questions.json"],
            *["--plan-vqa", splits / f"{other}_questions.json", "--image-root", self.data.output / "scenes"],
            *["--conversation-template", "mistral"],
        ]


def provenance() -> dict[str, str]:
    """Returns what makes results: the code, the versions of the packages that compute, and the device."""
    packages = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    device = os.environ.get("MEGATRON_SMAR_DEVICE", "cpu")
    return {"code": source_hash(ROOT, STUDY_CODE), "device": device} | packages


def _files(stage: str) -> tuple[str, ...]:
    return "model", "optimizer", stage


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out while one makes what is in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rounded(value: Any) -> Any:
    """Returns a result with six significant digits, which are more than the measures have."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
