# SPDX-License-Identifier: Apache-2.0
"""The demo's steps: data, vision encoder, three training stages and evaluation, each by a program of the project.

Stages 0 and 1 do not depend on the routing strategy of stage 2, so all variants of stage 2 start from one checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import EVALUATION_CODE, ROOT, SCRIPTS, Pipeline
from steps import Step, StepError, source_hash
from variants import Variant, quick_settings, settings, words

from megatron_smar.checkpoint.metadata import find_checkpoint, read_common_state, read_contents, saved_arguments
from megatron_smar.config.run_file import flag_parser
from megatron_smar.report.numbers import duration
from megatron_smar.routing.strategies import STRATEGIES

RANKS = 2
TEXT_ONLY = 0.025  # share of pure text in stage 2, as in the paper
PLACEMENT_CODE = ["megatron_smar/commands/placement.py", "megatron_smar/placement/*.py"]

# The paper's recipe (its Table 7) with batch sizes and learning rates for a small model.
STAGES = ("stage0", "stage1", "stage2")
BEFORE, AFTER = "evaluation_stage1", "evaluation_stage2"
PLACEMENT_LOGS = ("placement_plan", "placement_report")


@dataclass
class Demo(Pipeline):
    """The demo's steps up to stage 1, which all variants share; `quick` stands for the settings in quick.yaml."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._quick = quick_settings() if self.quick else {}

    def added(self, step: str) -> dict[str, Any]:
        """Returns the flags that --quick adds to a step."""
        return dict(self._quick.get(step, {}))

    def prepare(self) -> None:
        """Runs all shared steps: data, vision encoder, stages 0 and 1, and the evaluation before stage 2."""
        self.prepare_data()
        self.pretrain_vision()
        self.train("stage0", "text", None)
        self.train("stage1", "captions", "stage0")
        self.steps[BEFORE] = self.evaluation(self.steps["stage1"], BEFORE, self.output)
        self.evaluate(self.steps["stage1"], self.steps[BEFORE])

    def prepare_data(self) -> None:
        """Makes sources, language data, images, and shards of all of them."""
        self.step("corpus", self.added("corpus"), code=self.data_code).run(self._make_corpus)
        self.make_scenes()
        self.step("shards", code=self.data_code, inputs=("corpus", "scenes")).run(self._make_shards)

    def _make_corpus(self) -> None:
        self.program(self.log("sources"), SCRIPTS / "sources.py", "--cache", self.cache)
        self.program(self.log("corpus"), SCRIPTS / "corpus.py", *self.places("corpus"))

    def _make_shards(self) -> None:
        corpus, scenes, shards = (self.output / name for name in ("corpus", "scenes", "shards"))
        for name, records in {
            "text": corpus / "train.jsonl",
            "captions": scenes / "captions.json",
            "instructions": scenes / "instructions.json",
            "text_instructions": corpus / "text_instructions.json",
        }.items():
            command = ["tools/data/prepare.py", "--train", records, "--image-root", scenes, "--output", shards / name]
            self.program(self.log(f"shards_{name}"), *command, "--overwrite")
        blend = [(1 - TEXT_ONLY, "instructions"), (TEXT_ONLY, "text_instructions")]
        entries = "".join(f"      - weight: {weight}\n        path: ./{name}\n" for weight, name in blend)
        header = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        (shards / "stage2.yaml").write_text(header + entries)

    def train(self, name: str, data: str, before: str | None) -> None:
        """Runs one of the stages that all variants share, from the checkpoint of the step before."""
        files, flags = self.stage_flags(name)
        inputs = ("shards", "vision", *([before] if before else []))
        step = self.step(name, [settings(file) for file in files], flags, code=self.training_code, inputs=inputs)
        start = self.steps[before] if before else None
        step.run(lambda: self.train_stage(step, flags, data, start, self.log(name)))
        check_record(step, settings(name) | self.added(name), self.output / "shards" / data)

    def stage_flags(self, stage: str, variant: Mapping[str, Any] | None = None) -> tuple[list[str], list[str]]:
        """Returns a stage's run files, by name, and its command line without the paths of data and results."""
        files = ["model", "optimizer", stage]
        parts = ["--vision-model", self.output / "vision", "--tokenizer-model", self.output / "corpus/tokenizer.model"]
        added = words(self.added(stage) | dict(variant or {}))
        return files, ["--config", *(str(SCRIPTS / f"{file}.yaml") for file in files), *map(str, parts), *added]

    def train_stage(self, step: Step, flags: list[str], data: str, before: Step | None, log: Path) -> None:
        """Runs `pretrain_vlm.py`; if it was interrupted, it resumes from --save."""
        start = ["--load", before.folder, "--finetune"] if before else []
        paths = ["--data-path", self.output / "shards" / data, "--save", step.folder]
        logs = ["--tensorboard-dir", step.folder / "tensorboard", "--rejects-dir", step.folder / "rejects"]
        self.program(log, "pretrain_vlm.py", *flags, *paths, *logs, *start, ranks=RANKS)

    def evaluation(self, trained: Step, name: str, folder: Path) -> Step:
        """Returns the step that evaluates a checkpoint, without running it.

        Args:
            trained: The step with the checkpoint.
            name: Name of the evaluation.
            folder: Folder that has the evaluation's folder.
        """
        code = source_hash(ROOT, EVALUATION_CODE)
        return Step(name, folder / name, inputs=[trained], code=code, any_code=self.any_code)

    def evaluate(self, trained: Step, evaluation: Step) -> None:
        """Evaluates a checkpoint on the held-out texts and images."""
        corpus, scenes = self.output / "corpus", self.output / "scenes"
        log = evaluation.folder.parent / "logs" / f"{evaluation.name}.log"
        evaluation.run(
            lambda: self.program(
                log,
                *["tools/evaluate.py", "--load", trained.folder, "--output", evaluation.folder / "results.json"],
                *["--conversation-template", "mistral"],  # stage 1 was trained with `plain`, which has no questions
                *["--text", corpus / "held_out.jsonl"],
                *["--vqa", scenes / "vqa_held_out.json", "--image-root", scenes],
                ranks=RANKS,
            )
        )

    def placement(self, trained: Step, folder: Path) -> Step:
        """Returns the step that plans the experts' placement and counts what crosses devices, without running it.

        Args:
            trained: The step with the checkpoint.
            folder: Folder that has the step's folder.
        """
        code = source_hash(ROOT, [*PLACEMENT_CODE, *EVALUATION_CODE])
        return Step("placement", folder / "placement", RANKS, inputs=[trained], code=code, any_code=self.any_code)

    def place(self, trained: Step, placement: Step, keeps_loads: bool) -> None:
        """Counts, on the held-out samples, the tokens whose experts are on more than one device.

        Args:
            trained: The step with the checkpoint.
            placement: The step from `placement`.
            keeps_loads: Whether the checkpoint has the experts' loads, from which the plan is made; if not, they are
                counted on the same samples.
        """
        corpus, scenes, folder = self.output / "corpus", self.output / "scenes", placement.folder
        samples = ["--text", corpus / "held_out.jsonl", "--vqa", scenes / "vqa_held_out.json", "--image-root", scenes]
        asked = ["--conversation-template", "mistral"]
        common = ["--load", trained.folder, "--devices", RANKS]
        plan, report = folder / "plan.json", folder / "report.json"

        def work() -> None:
            plan_log, report_log = (folder.parent / "logs" / f"{name}.log" for name in PLACEMENT_LOGS)
            counted = [] if keeps_loads else [*samples, *asked]
            command = ["tools/placement.py", "plan", *common, *counted, "--output", plan]
            self.program(plan_log, *command, ranks=0 if keeps_loads else RANKS)
            command = ["tools/placement.py", "report", *common, *samples, *asked, "--plan", plan, "--output", report]
            self.program(report_log, *command, ranks=RANKS)

        placement.run(work)


@dataclass
class VariantRun:
    """The steps of one variant of stage 2, which need the shared steps' results.

    Attributes:
        demo: The shared steps, which are done.
        variant: The variant.
        folder: Folder of its results.
        stage2: The step with its checkpoint.
        evaluation: The step with its results on held-out data.
        placement: The step that counts what crosses devices, for the comparison.
    """

    demo: Demo
    variant: Variant

    def __post_init__(self) -> None:
        demo = self.demo
        self.folder = self.variant.folder(demo.output)
        files, self._flags = demo.stage_flags("stage2", self.variant.flags)
        key = ([settings(file) for file in files], self._flags)
        inputs = [demo.steps[name] for name in ("shards", "vision", "stage1")]
        self.stage2 = Step(
            "stage2", self.folder / "stage2", *key, inputs=inputs, code=demo.training_code, any_code=demo.any_code
        )
        self.evaluation = demo.evaluation(self.stage2, AFTER, self.folder)
        self.placement = demo.placement(self.stage2, self.folder)

    @property
    def is_evaluated(self) -> bool:
        """Whether the variant is trained and evaluated."""
        return self.stage2.is_done() and self.evaluation.is_done()

    @property
    def is_done(self) -> bool:
        """Whether the variant is trained, evaluated and placed."""
        return self.is_evaluated and self.placement.is_done()

    @property
    def is_current(self) -> bool:
        """Whether the present code made all of the variant's results."""
        return self.evaluation.is_current and self.placement.is_current

    @property
    def results(self) -> dict[str, Any]:
        """What evaluate.py measured."""
        return results_of(self.evaluation)

    def run(self) -> VariantRun:
        """Trains and evaluates the variant, as far as that is not done."""
        log, start = self.folder / "logs" / "stage2.log", self.demo.steps["stage1"]
        self.stage2.run(lambda: self.demo.train_stage(self.stage2, self._flags, "stage2.yaml", start, log))
        self.demo.evaluate(self.stage2, self.evaluation)
        return self

    def place(self) -> VariantRun:
        """Counts what crosses devices under the variant, as far as that is not done."""
        keeps_loads = "loads" in STRATEGIES[self.variant.routing].training_state
        self.demo.place(self.stage2, self.placement, keeps_loads)
        return self


def time_left(done: Sequence[VariantRun], left: int) -> str:
    """Returns the time that further variants will take, as the end of a sentence; empty while nothing is known.

    Args:
        done: The variants that are done.
        left: Number of those that are not.
    """
    if not done or not left:
        return ""
    steps = [step for run in done for step in (run.stage2, run.evaluation, run.placement) if step.is_done()]
    return f", about {duration(sum(step.seconds for step in steps) / len(done) * left)} left"


def results_of(evaluation: Step) -> dict[str, Any]:
    """Returns the results of an evaluation."""
    results: dict[str, Any] = json.loads((evaluation.folder / "results.json").read_text())
    return results


def crossing(placement: Step) -> dict[str, float]:
    """Returns the share of tokens whose experts are on both devices, `before` and `after` the placement."""
    devices = json.loads((placement.folder / "report.json").read_text())["devices"][str(RANKS)]
    return {when: devices[when]["all"]["crossing"] for when in ("before", "after")}


def check_record(step: Step, flags: Mapping[str, Any], data: Path) -> None:
    """Checks that a stage's checkpoint is what the demo asked for, by the arguments that the checkpoint stores.

    Raises:
        StepError: The checkpoint was trained with other flags or data, or not to the end; or there is none.
    """
    try:
        checkpoint = find_checkpoint(step.folder)
        state = read_common_state(checkpoint, read_contents(checkpoint))
    except ValueError as error:
        raise StepError(f"{step.name}: {error}") from error
    saved = vars(saved_arguments(state))
    wanted = vars(flag_parser().parse_args(words(flags)))
    given = {action.dest for action in flag_parser()._actions if _names(action.option_strings) & flags.keys()}
    differing = [name for name in sorted(given) if _single(saved.get(name)) != _single(wanted[name])]
    found = {name: (saved.get(name), wanted[name]) for name in differing}
    if [str(path) for path in saved["data_path"]] != [str(data)]:
        found["data_path"] = (saved["data_path"], [str(data)])
    if state["iteration"] != wanted["train_iters"]:
        found["iteration"] = (state["iteration"], wanted["train_iters"])
    if found:
        said = ", ".join(f"{name} {have!r} instead of {want!r}" for name, (have, want) in found.items())
        raise StepError(f"the checkpoint in {step.folder} was trained with {said}: remove the folder and run again.")


def _single(value: Any) -> Any:
    """Returns the value of a list of one, as which Megatron stores flags that take several values."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _names(options: Sequence[str]) -> set[str]:
    return {option.removeprefix("--") for option in options}
