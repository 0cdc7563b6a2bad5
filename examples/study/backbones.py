# SPDX-License-Identifier: Apache-2.0
"""The models that are studied: the checkpoint that stage 2 starts from, for each model and seed, and its flags."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from grid import EMOJI_TINY, SMOLLM2_MOE, TEXT_SHARE, Base, Grid, run_file, settings_of
from pipeline import Pipeline
from programs import locked, run_alone
from recipe import CONVERT, MIXTURE, Recipe, model_flags
from steps import Step
from study_data import Data
from variants import words


class Backbone(ABC):
    """The models of a grid up to the stage in which the arms differ.

    Args:
        grid: The grid.
        data: The data that all runs share.
        work: Folder of checkpoints and logs.
    """

    template: ClassVar[str]  # of conversations
    shared_files: ClassVar[tuple[str, ...]]  # run files of every stage
    last_stage: ClassVar[str]  # run file of the stage in which the arms differ
    measured_with: ClassVar[tuple[str, ...]] = ()  # options of measure.py

    def __init__(self, grid: Grid, data: Data, work: Path) -> None:
        self.grid, self.data, self.work = grid, data, work

    def prepare(self) -> None:
        """Makes what all runs share."""
        self.data.prepare()

    def make(self, base: Base) -> Path:
        """Makes the checkpoint that the arms of a model and seed start from, unless that is done.

        Args:
            base: The model and the seed.

        Returns:
            Its folder.

        Raises:
            StepError: A program failed.
        """
        with locked(self.folder(base)):
            return self._make(base)

    @abstractmethod
    def _make(self, base: Base) -> Path: ...

    @abstractmethod
    def _model_flags(self, base: Base, stage: str) -> list[object]:
        """Returns the flags of the model in a stage that are not in the run files."""

    def folder(self, base: Base) -> Path:
        """Returns the folder of a model and seed."""
        model, seed = base
        return self.work / model / f"seed-{seed}"

    def flags(self, base: Base, own: Mapping[str, Any], stage: str | None = None) -> list[str]:
        """Returns the command line of a stage without data, start and results.

        Args:
            base: The model and the seed.
            own: The flags of an arm, with its share of pure text.
            stage: The stage (default: that in which the arms differ).
        """
        stage = stage or self.last_stage
        model, seed = base
        files = [run_file(self.grid.backbone, name) for name in (*self.shared_files, stage)]
        given = {**self.grid.common, **self.grid.models[model], **self.grid.stages.get(stage, {}), **own, "seed": seed}
        share = given.pop(TEXT_SHARE, None)
        given |= {"text-only-ratio": share} if share else {}
        return ["--config", *map(str, [*files, *self._model_flags(base, stage)]), *words(given)]

    def train(self, flags: list[str], data: str, folder: Path, start: Path | None) -> None:
        """Trains from a checkpoint, or from random weights.

        Args:
            flags: The command line without data, start and results.
            data: Name of the shards.
            folder: Folder of the new checkpoint.
            start: The checkpoint to start from.
        """
        paths = ["--data-path", self.data.output / "shards" / data, "--save", folder]
        paths += ["--load", start, "--finetune"] if start else []
        run_alone(["pretrain_vlm.py", *flags, *map(str, paths)], folder.with_name(f"{folder.name}.log"))

    def _stage(self, base: Base, stage: str, data: str, start: Path | None, before: Step | None = None) -> Step:
        """Trains one of the stages that the arms share, unless that is done."""
        flags = self.flags(base, {}, stage)
        files = [settings_of(self.grid.backbone, name, self.grid.layout) for name in (*self.shared_files, stage)]
        return self._step(base, stage, before, lambda folder: self.train(flags, data, folder, start), files, flags)

    def _step(self, base: Base, name: str, before: Step | None, work: Callable[[Path], None], *key: Any) -> Step:
        inputs = [*self._made_from(), *([before] if before else [])]
        step = Step(name, self.folder(base) / name, *key, inputs=inputs, any_code=True)
        if not step.is_done():
            step.run(lambda: work(step.folder))
        return step

    def _made_from(self) -> list[Step]:
        """Returns the steps whose results every stage reads."""
        return [self.data.steps[name] for name in ("shards", "vision")]


class EmojiTiny(Backbone):
    """The demo's model: stage 0 trains the language model from random weights, stage 1 the connector.

    A grid that gives stage 0 a seed has one language model for all seeds, as studies of published models do.
    """

    template = "mistral"
    shared_files = ("model", "optimizer")
    last_stage = "stage2"

    def _make(self, base: Base) -> Path:
        model, seed = base
        pretrained = model, self.grid.stages["stage0"].get("seed", seed)
        with nullcontext() if pretrained == base else locked(self.folder(pretrained)):
            stage0 = self._stage(pretrained, "stage0", "text", None)
        return self._stage(base, "stage1", "captions", stage0.folder, stage0).folder

    def _model_flags(self, base: Base, stage: str) -> list[object]:
        data = self.data.output
        return ["--vision-model", data / "vision", "--tokenizer-model", data / "corpus/tokenizer.model"]


class SmolLM2MoE(Backbone):
    """SmolLM2 with the demo's vision encoder: stage 1 trains the connector, then the model is upcycled.

    The seed decides the order of the data in both stages; connector and routers begin with the same weights.
    """

    template = "chatml"
    shared_files = ("training",)
    last_stage = "stage3"
    measured_with = ("--float32", "--seq-length", "1024", "--batch-size", "8")  # one precision before and after

    def __init__(self, grid: Grid, data: Data, work: Path) -> None:
        super().__init__(grid, data, work)
        self._published = _Published(
            data.output, data.cache, any_code=True, size=grid.layout, language=grid.language, with_tasks=False
        )

    def prepare(self) -> None:
        """Makes the data, fetches SmolLM2 and imports it with the vision encoder."""
        self._published.fetch_weights()  # first: what is not installed fails before the data is made
        super().prepare()
        self._published.steps |= self.data.steps
        self._published.import_parts()

    def _make(self, base: Base) -> Path:
        stage1 = self._stage(base, "stage1", "captions", self._published.imported)
        self._step(base, "upcycled", stage1, lambda folder: self._upcycle(stage1.folder, folder), MIXTURE)
        return self._upcycled(base)

    def _made_from(self) -> list[Step]:
        return [*super()._made_from(), self._published.steps["import"]]

    def _upcycle(self, stage1: Path, folder: Path) -> None:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # of an attempt that was interrupted
        source = ["--load", stage1, "--hf", self._published.imported / "hf", *words(MIXTURE)]
        command = [CONVERT, "upcycle", *source, "--output", folder / "checkpoint"]
        run_alone(list(map(str, command)), folder.with_name(f"{folder.name}.log"))

    def _upcycled(self, base: Base) -> Path:
        return self.folder(base) / "upcycled" / "checkpoint"

    def _model_flags(self, base: Base, stage: str) -> list[object]:
        converted = self._published.imported if stage == "stage1" else self._upcycled(base)
        return ["--layout", self.grid.layout, *model_flags(converted)]


class _Published(Recipe):
    """The weights of the recipe and their import, without its estimates of the time left."""

    run_step = Pipeline.run_step


BACKBONES: dict[str, type[Backbone]] = {EMOJI_TINY: EmojiTiny, SMOLLM2_MOE: SmolLM2MoE}
