# SPDX-License-Identifier: Apache-2.0
"""The study's grid: which models, arms and seeds there are, from a YAML file, and the runs and results it asks for."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pipeline import ROOT
from steps import fingerprint
from variants import Variant

from megatron_smar.config.run_file import read_flags
from megatron_smar.routing.strategies import STRATEGIES

TUNING, MAIN = "tuning", "main"
SPLIT_OF = {TUNING: "validation", MAIN: "test"}
EMOJI_TINY, SMOLLM2_MOE = "emoji_tiny", "smollm2_moe"
# The run files of the examples whose models the study can train.
RUN_FILES = {
    EMOJI_TINY: ("model", "optimizer", "stage0", "stage1", "stage2"),
    SMOLLM2_MOE: ("training", "stage1", "stage3"),
}
# Paths that can be given on the command line, with their defaults, and those with --smollm2.
PLACES = {
    "grid": ("examples/study/grid.yaml", "examples/study/grid_smollm2.yaml"),
    "output": ("runs/study", "runs/study-smollm2"),
    "cache": ("runs/sources", "runs/sources"),
    "results": ("docs/study/results", "docs/study/results_smollm2"),
}
# Keys of an arm that are no flags: its share of pure text, and the tuned arms whose chosen values it takes.
TEXT_SHARE, LIKE = "text-share", "like"
Flags = Mapping[str, Any]
Base = tuple[str, int]  # model and seed, which have the stages before the last in common


@dataclass(frozen=True)
class Run:
    """One stage 2 with its measures.

    Attributes:
        part: `tuning` or `main`, which decides the seeds and the split that is measured.
        model: Name of a model of the grid.
        arm: Name of the arm: a strategy with its settings.
        seed: Seed of the stages, unless the grid gives a stage its own, and of the data's order.
        flags: Flags of stage 2 beside those that all runs share, with the share of pure text.
    """

    part: str
    model: str
    arm: str
    seed: int
    flags: Flags = field(hash=False)

    @property
    def name(self) -> str:
        """The run's name on the command line, and the path of its result without the ending."""
        return f"{self.part}/{self.model}/{self.arm}/{self.seed}"

    @property
    def base(self) -> Base:
        """The model and seed whose stages before the last the run starts from."""
        return self.model, self.seed


@dataclass(frozen=True)
class Grid:
    """The content of a grid's file.

    Attributes:
        data: Options of the demo's programs that make the data, by step.
        common: Flags of every stage of every run.
        stages: Flags of the stages beside those of the demo's run files.
        models: Flags of each model beside those of the demo's.
        arms: Flags of each arm, with the values that the tuning starts from.
        tuning: Seeds, and for each model the arms and the values to try.
        main: For each model the arms and their numbers of seeds, and the values that the tuning chose for it, by arm.
        backbone: The example whose model and stages are studied.
        layout: The layout of its run files; empty where they have none.
        language: A Hugging Face folder of a language model to use instead of SmolLM2.
    """

    data: Mapping[str, Flags]
    common: Flags
    stages: Mapping[str, Flags]
    models: Mapping[str, Flags]
    arms: Mapping[str, Flags]
    tuning: Mapping[str, Any]
    main: Mapping[str, Any]
    backbone: str = EMOJI_TINY
    layout: str = ""
    language: Path | None = None

    def __post_init__(self) -> None:
        _known(self.backbone, RUN_FILES, "backbone")
        for named in (self.tuning["runs"], self.main["runs"], self.main["chosen"]):
            for model, arms in named.items():
                _known(model, self.models, "model")
                for arm in arms:
                    _known(arm, self.arms, "arm")
        if shared := set(self.tuning["seeds"]) & set(range(1, 1 + self._seeds_of_main())):
            raise ValueError(f"The grid: seeds {sorted(shared)} are of tuning and main; give tuning its own seeds.")
        for name, arm in self.arms.items():
            for other in arm.get(LIKE, ()):
                _known(other, self.arms, "arm")
            variant = Variant(name, {flag: value for flag, value in arm.items() if flag not in (TEXT_SHARE, LIKE)}, {})
            _check_own(variant)
        for model, arms in self.main["runs"].items():
            for arm in arms:
                self._check_chosen(model, arm)
        for run in self.runs():
            Variant(run.name, {flag: value for flag, value in run.flags.items() if flag != TEXT_SHARE}, {})

    def runs(self) -> list[Run]:
        """Returns all runs, seed by seed, so that what is done at any time is paired."""
        return [*self._runs_of_tuning(), *self._runs_of_main()]

    def key(self, run: Run) -> str:
        """Returns a hash of all settings that the run depends on."""
        own = [self.data, self.common, self.stages, self.models[run.model], run.flags, run.seed, run.part]
        own += [self.language] if self.language else []
        files = [settings_of(self.backbone, name, self.layout) for name in RUN_FILES[self.backbone]]
        return fingerprint(files, *own)

    def result(self, run: Run, folder: Path) -> dict[str, Any] | None:
        """Returns a run's result from the folder of results; None if there is none, or it has other settings."""
        file = folder / f"{run.name}.json"
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if found["key"] == self.key(run) else None

    def flags_of(self, model: str, arm: str) -> Flags:
        """Returns an arm's flags in the main part, with the values chosen for it, or for the arms that it is like."""
        flags = dict(self.arms[arm])
        for name in flags.pop(LIKE, [arm]):
            flags |= self.main["chosen"].get(model, {}).get(name, {})
        return flags

    def tuned_flags(self, arm: str) -> set[str]:
        """Returns the flags of an arm that the tuning of any model tries."""
        return {flag for arms in self.tuning["runs"].values() for flag in arms.get(arm, ())}

    def _check_chosen(self, model: str, arm: str) -> None:
        """Refuses an arm of the main part that would silently have the values that the tuning starts from."""
        for name in self.arms[arm].get(LIKE, [arm]):
            chosen = self.main["chosen"].get(model, {}).get(name, {})
            if missing := sorted(self.tuned_flags(name) - chosen.keys()):
                raise ValueError(
                    f"The grid: {arm} of {model} needs the value of {', '.join(missing)} that the tuning chose for "
                    f"{name}; write it into main.chosen.{model}.{name}."
                )

    def _seeds_of_main(self) -> int:
        return max((number for arms in self.main["runs"].values() for number in arms.values()), default=0)

    def _runs_of_main(self) -> list[Run]:
        found = []
        for model, arms in self.main["runs"].items():
            for seed, (arm, number) in itertools.product(range(1, 1 + self._seeds_of_main()), arms.items()):
                if seed <= number:
                    found.append(Run(MAIN, model, arm, seed, self.flags_of(model, arm)))
        return sorted(found, key=lambda run: run.seed)

    def _runs_of_tuning(self) -> list[Run]:
        found = []
        for model, arms in self.tuning["runs"].items():
            for seed, (arm, tried) in itertools.product(self.tuning["seeds"], arms.items()):
                own = {flag: value for flag, value in self.arms[arm].items() if flag != LIKE}
                for changes in tried_settings(tried):
                    found.append(Run(TUNING, model, tried_name(arm, changes), seed, own | changes))
        return sorted(found, key=lambda run: run.seed)


def run_file(backbone: str, name: str) -> Path:
    """Returns a run file of an example, relative to the project's folder."""
    return Path("examples") / backbone / f"{name}.yaml"


@cache
def settings_of(backbone: str, name: str, layout: str) -> dict[str, Any]:
    """Returns the settings in a run file of an example, in a layout."""
    return read_flags(ROOT / run_file(backbone, name), layout or None)


def tried_settings(tried: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns the settings to try: each value of each flag alone; a single empty one for an arm without flags."""
    return [{flag: value} for flag, values in tried.items() for value in values] or [{}]


def tried_name(arm: str, changes: Flags) -> str:
    """Returns the name that an arm of the tuning has with changed values."""
    return "__".join([arm, *(f"{flag}_{_text(value)}" for flag, value in changes.items())])


def _text(value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return ",".join(map(str, words)).replace("=", "_")


def _known(name: str, known: Mapping[str, Any], what: str) -> None:
    if name not in known:
        raise ValueError(f"The grid: there is no {what} {name}; give one of {', '.join(known)}.")


def _check_own(arm: Variant) -> None:
    """Refuses an arm with a flag of another strategy, which would change nothing that it trains."""
    for strategy in STRATEGIES.values():
        others = {strategy.flag(field.name).removeprefix("--") for field in strategy.flag_fields()}
        if strategy.name != arm.routing and (unused := sorted(others & arm.flags.keys())):
            raise ValueError(
                f"The grid: {arm.name} has --{unused[0]}, which trains nothing with --modality-routing {arm.routing}; "
                "leave it out."
            )


def read_grid(path: Path) -> Grid:
    """Reads a grid.

    Raises:
        ValueError: It names an unknown model or arm, or a flag that stage 2 would refuse.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    language = content.pop("language", None)
    return Grid(**content, language=language and path.parent / language)


def add_places(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the options for some of a study's paths, and --smollm2, which changes their defaults."""
    parser.add_argument("--smollm2", action="store_true", help="study SmolLM2 as a mixture, on one GPU")
    for name in names:
        usual, smollm2 = PLACES[name]
        parser.add_argument(f"--{name}", type=Path, help=f"default: {usual}; with --smollm2: {smollm2}")


def set_places(options: argparse.Namespace) -> None:
    """Sets the paths of `PLACES` that were not given, and writes all in one way (see `in_project`)."""
    for name in PLACES.keys() & vars(options).keys():
        given = getattr(options, name)
        setattr(options, name, Path(PLACES[name][options.smollm2]) if given is None else in_project(given))


def in_project(path: Path) -> Path:
    """Returns a path relative to the project's folder if it is inside it; stages with other paths are trained again."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
