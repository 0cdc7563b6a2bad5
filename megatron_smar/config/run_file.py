# SPDX-License-Identifier: Apache-2.0
"""A run as one file: `--config run.yaml`, with Megatron's and this project's flags as keys.

    model:                      # groups are for the reader and can have any names
      num-layers: 32
      group-query-attention: true
    training:
      freeze: [vision]
      lr: 2e-5
    layouts:                    # at most one of these is used, chosen by --layout
      64: {expert-model-parallel-size: 8}
      tiny: {expert-model-parallel-size: 2, train-iters: 5}

A later file overrides an earlier one, and the command line overrides files.
"""

from __future__ import annotations

from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from megatron.training.arguments import add_megatron_arguments

from megatron_smar.config.flags import add_arguments

LAYOUTS = "layouts"
RUN_FILE = "run.yaml"


def add_run_file_options(parser: Any) -> None:
    """Adds --config, --layout and --unset, for --help and for `expand`."""
    parser.add_argument(
        "--config", nargs="+", type=Path, metavar="FILE", help="YAML files with flags as keys; the command line wins"
    )
    parser.add_argument("--layout", metavar="NAME", help=f"which of the `{LAYOUTS}` in --config to use")
    parser.add_argument("--unset", nargs="+", default=[], metavar="FLAG", help="flags in --config to leave out")


def expand(argv: Sequence[str]) -> list[str]:
    """Returns the command line with the flags of its --config files in front of its own.

    Args:
        argv: The command line as given.

    Raises:
        ValueError: A file cannot be read, or has a key or value that is not valid for a flag.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_run_file_options(parser)
    try:
        own, rest = parser.parse_known_args(argv)
    except ArgumentError as error:
        raise ValueError(f"{error}; docs/run_files.md describes it.") from error
    if own.config is None:
        if own.layout is not None or own.unset:
            flag = f"--layout {own.layout}" if own.layout is not None else f"--unset {' '.join(own.unset)}"
            raise ValueError(f"{flag} refers to a file of flags: give the file as --config.")
        return rest
    flags: dict[str, Any] = {}
    for path in own.config:
        flags |= read_flags(path, own.layout)
    for name in own.unset:
        if _canonical(name) not in flags:
            raise ValueError(f"--unset {name} is not in {' '.join(map(str, own.config))}; leave it out.")
        del flags[_canonical(name)]
    return [*(word for name, value in flags.items() for word in _words(name, value)), *rest]


def read_flags(path: Path, layout: str | None = None) -> dict[str, Any]:
    """Returns the flags of a file, by name without leading dashes.

    Args:
        path: The YAML file.
        layout: Which of the file's `layouts` to use; None if it has none.

    Raises:
        ValueError: As for `expand`.
    """
    content = _read(path)
    layouts = {str(name): flags for name, flags in (content.pop(LAYOUTS, None) or {}).items()}
    flags: dict[str, Any] = {}
    for name, value in _flags(content, path):
        if name in flags:
            raise ValueError(f"--config {path} gives {name} twice; leave one of them out.")
        flags[name] = value
    if layouts and layout not in layouts:
        given = "is missing" if layout is None else f"{layout} is not in {path}"
        raise ValueError(f"--layout {given}: give one of {', '.join(layouts)}, which --config {path} has.")
    if layout in layouts:
        flags |= dict(_flags(layouts[layout] or {}, path))
    return flags


def saved_folder(path: Path) -> Path:
    """Returns the folder of a run's checkpoints: the folder of its run.yaml, or the value of `save` in that file.

    Raises:
        ValueError: The file cannot be read or names no folder.
    """
    if any(path.parent.glob("latest_checkpointed_iteration.txt")):
        return path.parent
    found = dict(_flags(_read(path), path)).get("save")
    if found is None:
        raise ValueError(
            f"{path} has no `save`, and no checkpoint is next to it: give the checkpoint's folder instead."
        )
    return Path(found)


def write_run_file(folder: Path, argv: Sequence[str]) -> None:
    """Writes a command line as `run.yaml`, with the groups of --help; the file is replaced atomically.

    Args:
        folder: The run's --save; created if necessary.
        argv: The flags, after `expand`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, values in _given(argv):
        groups.setdefault(_group_of(name), {})[name] = values
    text = "# What the run was started with: pretrain_vlm.py --config run.yaml starts or resumes it.\n"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RUN_FILE}.partial"
    partial.write_text(text + yaml.safe_dump(groups, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(folder / RUN_FILE)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where PyYAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice{str(node.start_mark).partition(',')[2]}")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not isinstance(content.get(LAYOUTS) or {}, dict):
        raise ValueError(f"--config {path} is not a mapping of flags; write them as `num-layers: 32`, or in groups.")
    return content


def _flags(content: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flags(value, path)
            continue
        name = _canonical(str(key))
        if name not in _actions():
            near = get_close_matches(name, _actions(), n=3, cutoff=0.7)
            closest = f" (close to it: {', '.join(near)})" if near else ""
            raise ValueError(f"--config {path}: {key} is not a flag{closest}; pretrain_vlm.py --help lists them.")
        _check_value(name, value, path)
        yield name, value


def _check_value(name: str, value: Any, path: Path) -> None:
    takes_none, takes_several = _actions()[name].nargs == 0, _actions()[name].nargs in ("+", "*")
    if takes_none and not (value is None or isinstance(value, bool)):
        raise ValueError(f"--config {path}: {name} is {value!r}, but the flag takes no value: write true or false.")
    if not takes_none and isinstance(value, bool):
        raise ValueError(f"--config {path}: {name} is {str(value).lower()}, but the flag takes a value: write it.")
    if isinstance(value, list) and not takes_several:
        raise ValueError(f"--config {path}: {name} is a list, but the flag takes one value: write one.")


def _words(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


def _canonical(name: str) -> str:
    """Returns a flag's name as the parser has it, from a name with dashes or underscores."""
    bare = name.removeprefix("--")
    return bare if bare in _actions() else bare.replace("_", "-")


@cache
def _actions() -> dict[str, Action]:
    """Returns the parser's flags by name."""
    return {
        option.removeprefix("--"): action
        for action in flag_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }


@cache
def flag_parser() -> ArgumentParser:
    """Returns the parser of Megatron's and this project's flags, for their names, defaults and groups; built once."""
    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False, conflict_handler="resolve")))


@cache
def _group_of(name: str) -> str:
    action = _actions().get(name)
    groups = flag_parser()._action_groups
    return str(next((group.title for group in groups if action in group._group_actions), "general"))


def _given(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields each flag of a command line with its value, as a YAML type."""
    flags: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, joined, value = word.removeprefix("--").partition("=")
            flags[name] = [value] if joined else []
        elif name:
            flags[name].append(word)
    for name, values in flags.items():
        action = _actions().get(name)
        if action is not None and action.nargs == 0:
            yield name, True
        else:
            several = action is not None and action.nargs in ("+", "*")
            yield name, [_plain(value) for value in values] if several else _plain(" ".join(values))


def _plain(text: str) -> Any:
    value = yaml.safe_load(text) if text else ""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text
