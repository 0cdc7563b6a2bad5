# SPDX-License-Identifier: Apache-2.0
"""Variants of stage 2: a routing strategy of --modality-routing with its flags, or a baseline, by name."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from megatron_smar.config.run_file import flag_parser
from megatron_smar.routing.strategies import STRATEGIES

HERE = Path(__file__).parent
DEFAULT = "smar"


def settings(name: str) -> dict[str, Any]:
    """Returns the flags of one of the demo's run files, by name."""
    (group,) = _read(name).values()
    return dict(group)


def quick_settings() -> dict[str, dict[str, Any]]:
    """Returns the flags that --quick adds, by step."""
    return _read("quick")


def variants() -> dict[str, dict[str, Any]]:
    """Returns the flags of every variant, by its name: those of strategies.yaml, and strategies that it leaves out."""
    listed = _read("strategies")
    return listed | {name: {"modality-routing": name} for name in STRATEGIES if name not in listed}


def words(flags: Mapping[str, Any]) -> list[str]:
    """Returns flags as words of a command line; true stands for a flag without value, a list for several values."""
    line: list[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        line += [f"--{name}", *map(str, values)]
    return line


@dataclass(frozen=True)
class Variant:
    """Stage 2 of the demo under one strategy.

    Attributes:
        name: Name in strategies.yaml.
        flags: Flags in addition to those in stage2.yaml, by name without leading dashes.
        changes: Those of the flags that the user gave (--set).

    Raises:
        ValueError: There is no such variant, or it has a flag or value that stage 2 would refuse.
    """

    name: str
    flags: Mapping[str, Any]
    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = _flags_of(flag_parser())
        for name in self.flags:
            if name not in known:
                near = get_close_matches(name, known, n=3, cutoff=0.6)
                closest = f" (close to it: {', '.join(near)})" if near else ""
                raise ValueError(f"{self.name}: {name} is not a flag{closest}; pretrain_vlm.py --help lists them.")
        for strategy in STRATEGIES.values():
            if strategy.name != self.routing:
                strategy.check_unused(self._arguments)
        STRATEGIES[self.routing].from_arguments(self._arguments)

    @property
    def label(self) -> str:
        """The name, with what the user changed."""
        return " ".join([self.name, *(f"{name}={_text(value)}" for name, value in self.changes.items())])

    @property
    def routing(self) -> str:
        """The value of --modality-routing."""
        return str(self._arguments.modality_routing)

    def folder(self, base: Path) -> Path:
        """Returns the folder of the variant's results: the demo's own folder for the default, else one beside it."""
        if self.name == DEFAULT and not self.changes:
            return base
        return base.with_name(f"{base.name}-{re.sub(r'[^\w.]+', '-', self.label)}")

    @cached_property
    def _arguments(self) -> Namespace:
        """All flags of stage 2 as arguments. Only their forms are checked here."""
        said = StringIO()
        try:
            with redirect_stderr(said):
                return flag_parser().parse_args(words(settings("stage2") | dict(self.flags)))
        except SystemExit as end:
            raise ValueError(f"{self.name}: {said.getvalue().strip().splitlines()[-1]}") from end


def find_variant(name: str, changes: Sequence[str] = ()) -> Variant:
    """Returns a variant by name, with further flags.

    Args:
        name: A name in strategies.yaml, or a strategy of --modality-routing.
        changes: Flags with values, each as `flag=value` with a YAML value, such as `smar-coeff=0.1` or
            `hard-experts=[text=0-5, vision=6-7]`.

    Raises:
        ValueError: See `Variant`; or a change has another form.
    """
    known = variants()
    if name not in known:
        raise ValueError(f"there is no routing {name}; give one of {', '.join(known)}.")
    changed: dict[str, Any] = {}
    for change in changes:
        flag, equals, value = change.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"--set {change} has no value: give it as flag=value, a flag without value as flag=true.")
        try:
            changed[flag.replace("_", "-")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change} has no YAML value: quote it, or write a list as [a, b].") from error
    return Variant(name, known[name] | changed, changed)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def _flags_of(parser: ArgumentParser) -> set[str]:
    return {option.removeprefix("--") for action in parser._actions for option in action.option_strings}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
