# SPDX-License-Identifier: Apache-2.0
"""What the programs that train on the demo's scenes share: folders, programs, scenes and vision encoder as steps."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps import Step, run_program, source_hash
from variants import words

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path("examples/emoji_tiny")
# Files whose change invalidates results: those that make the data, and those that train.
DATA_CODE = [f"examples/emoji_tiny/{name}.py" for name in ("sources", "corpus", "scenes", "pretrain_vision")]
TRAINING_PACKAGES = ("runtime", "routing", "model", "monitoring", "config", "training", "data")
TRAINING_CODE = [
    "pretrain_vlm.py",
    "megatron_smar/*.py",
    *(f"megatron_smar/{name}/**/*.py" for name in TRAINING_PACKAGES),
]
EVALUATION_CODE = ["megatron_smar/commands/evaluate.py", "megatron_smar/evaluation/**/*.py"]


@dataclass
class Pipeline:
    """Folders and programs of a series of steps.

    Attributes:
        output: Folder of the steps' results, relative to the project's folder if it is inside it.
        cache: Folder of the downloaded sources.
        quick: Whether every step is reduced to seconds.
        any_code: Whether results that other code made from the same settings are kept.
        steps: The steps so far, by name.
    """

    output: Path
    cache: Path
    quick: bool = False
    any_code: bool = False
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data_code = source_hash(ROOT, [*DATA_CODE, "megatron_smar/data/**/*.py"])
        self.training_code = source_hash(ROOT, TRAINING_CODE)

    def added(self, step: str) -> dict[str, Any]:
        """Returns the options that are added to those of a step's program."""
        return {}

    def program(self, log: Path, *command: object, ranks: int = 0, device: str | None = None) -> None:
        """Runs one of the project's programs, in one process or under torchrun, and records the command.

        Args:
            log: File for the output; the command is recorded next to it.
            *command: The program and its arguments.
            ranks: Number of ranks under torchrun; 0 for a process without torchrun.
            device: `cpu` or `cuda`; None for that in the environment, or else the CPU.
        """
        line = [str(word) for word in command]
        launch = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks else ["python"]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.with_suffix(".command").write_text(shlex.join([*launch, *line]))
        python = [sys.executable, "-m", "torch.distributed.run", *launch[1:]] if ranks else [sys.executable]
        threads = max(1, (os.cpu_count() or 1) // max(ranks, 1))
        run_program([*python, *line], log, ROOT, threads, device)

    def log(self, name: str) -> Path:
        """Returns the log file of a step's program."""
        return self.output / "logs" / f"{name}.log"

    def step(self, name: str, *key: Any, code: str, inputs: Sequence[str] = ()) -> Step:
        """Creates a step and registers it by its name."""
        before = [self.steps[name] for name in inputs]
        step = Step(name, self.output / name, *key, inputs=before, code=code, any_code=self.any_code)
        self.steps[name] = step
        return step

    def run_step(self, step: Step, work: Callable[[], None]) -> None:
        """Does a step's work unless it is done."""
        step.run(work)

    def make_scenes(self) -> None:
        """Makes the images with their captions, instructions and questions."""
        step = self.step("scenes", self.added("scenes"), code=self.data_code)
        self.run_step(step, lambda: self.program(self.log("scenes"), SCRIPTS / "scenes.py", *self.places("scenes")))

    def pretrain_vision(self) -> None:
        """Trains the vision encoder, the replacement for InternViT."""
        step = self.step("vision", self.added("vision"), code=self.data_code, inputs=("scenes",))
        self.run_step(
            step, lambda: self.program(self.log("vision"), SCRIPTS / "pretrain_vision.py", *self.places("vision"))
        )

    def places(self, name: str) -> list[str]:
        """Returns the options of a program that reads the cache and writes to the folder of its step."""
        places = ["--cache", str(self.cache), "--output", str(self.output / name)]
        return [*places, *words(self.added(name))]
