# SPDX-License-Identifier: Apache-2.0
"""Makes flags from a config dataclass, so that name, type, default and help of a setting are written once."""

from __future__ import annotations

import inspect
import re
from argparse import _ArgumentGroup
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints


class FlaggedConfig(Protocol):
    """A config whose fields are flags."""

    @classmethod
    def flag_fields(cls) -> list[Field[Any]]:
        """Returns the fields that are flags."""

    @classmethod
    def flag(cls, field: str) -> str:
        """Returns the flag of a field."""


def add_config_flags(group: _ArgumentGroup, config: type[FlaggedConfig]) -> None:
    """Adds the flags of a config.

    Args:
        group: Argument group of the parser.
        config: A frozen dataclass with Google-style `Attributes`, which become the help texts.
    """
    types, lines = get_type_hints(config), attribute_lines(config)
    for setting in config.flag_fields():
        default = _default(setting)
        text = lines[setting.name].replace("%", "%%")
        if default not in (None, ()):
            text += f" Default: {' '.join(default)}." if isinstance(default, tuple) else " Default: %(default)s."
        group.add_argument(config.flag(setting.name), default=default, help=text, **_parsing(types[setting.name]))


def attribute_lines(config: type) -> dict[str, str]:
    """Returns the `Attributes` of a class's docstring, by name, each on one line."""
    section = inspect.getdoc(config).partition("Attributes:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    parts = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _default(setting: Field[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _parsing(kind: Any) -> dict[str, Any]:
    """Returns argparse's keyword arguments for values of a type."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "PART"}
    if kind is bool:
        return {"action": "store_true"}
    return {"type": kind} | ({"metavar": "FILE"} if kind is Path else {})
