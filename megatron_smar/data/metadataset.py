# SPDX-License-Identifier: Apache-2.0
"""Checks the YAML files of a data folder or a metadataset before energon reads them, and opens them.

energon instantiates whatever these files name: any class or function of any module, or of a file next to them. Only
folders as tools/data/prepare.py writes them and energon's metadatasets are accepted; everything else is refused before
it is imported.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from megatron.energon.dataset_config import load_config
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta, check_dataset_info_present
from megatron.energon.metadataset import Metadataset
from megatron.energon.metadataset.dataset_loader import DatasetLoader
from megatron.energon.metadataset.metadataset_v2 import Subset

from megatron_smar.credentials import check_address, redacted
from megatron_smar.data.paths import META_FOLDER, PREPARE, energon_path, reason

DATASET_CLASS = ("megatron.energon", "CrudeWebdataset")
_CODE = ("__module__", "__class__", "__function__")
# Metadataset class -> key of a list of sources -> key of a source's share in that list.
_LISTS = {
    "Metadataset": {"datasets": "weight"},
    "MetadatasetV2": {"blend": "weight", "blend_epochized": "repetitions"},
}
_REFERENCE = ("path", "split_part", "subflavors", "shuffle_over_epochs_multiplier", "dataset_config", "split_config")
_OWN = {"Metadataset": ("subflavor",), "MetadatasetV2": ("subset",)}
_PLAIN_TAG = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|map|seq|timestamp)")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_sources(path: str, flag: str) -> None:
    """Checks the files that describe the data at `path`, including every folder that a metadataset names.

    Args:
        path: A folder of shards or a metadataset, already checked by `check_data_path`.
        flag: The flag with which `path` was given, for the message.

    Raises:
        ValueError: A file is not accepted; the message names the file, the source and the value.
    """
    place = EPath(energon_path(path))
    if path.endswith(".yaml"):
        for _ in _metadataset(place, f"{flag} {path}", ()):
            pass
    else:
        _check_folder(place, {}, f"{flag} {path}")


def open_sources(path: str, split: str, flag: str) -> Any:
    """Returns energon's loader for one split of the data at `path`, without sources of weight 0.

    Raises:
        ValueError: As `check_sources`, or there is no such split.
    """
    check_sources(path, flag)
    return _open(EPath(energon_path(path)), split, f"{flag} {path}")


def _open(path: EPath, split: str, where: str, reference: Any = None) -> Any:
    if not path.name.endswith(".yaml"):
        settings = {name: getattr(reference, name, None) for name in ("dataset_config", "split_config")}
        _check_split(path, settings["split_config"], split, where)
        return DatasetLoader(path=path, **settings)
    metadataset = load_config(path, default_type=Metadataset, default_kwargs={"path": path})
    splits = metadataset._splits if isinstance(metadataset, Metadataset) else metadataset.splits
    if split not in splits:
        raise ValueError(f"{where} has no split `{split}`, only {_names(splits)}.")
    chosen = splits[split]
    for lists in _LISTS.values():
        for name, share in lists.items():
            if hasattr(chosen, name):
                setattr(chosen, name, [source for source in getattr(chosen, name) if getattr(source, share)])
    for number, source in enumerate(_references(chosen), 1):
        label = f"{path}, split `{split}`, source {number} ({source.path})"
        source.path = _resolve(path, source.path)
        source._dataset = _open(source.path, source.split_part or split, label, source)
    return metadataset


def _references(split: Any) -> list[Any]:
    found = [getattr(split, name) for lists in _LISTS.values() for name in lists if hasattr(split, name)]
    return found[0] if found else [split]


def _metadataset(path: EPath, where: str, parents: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Checks a metadataset; yields each split's name and its kind of list (None for a single source)."""
    if str(path) in parents:
        raise ValueError(f"{where} is a metadataset that names itself, through {' -> '.join([*parents, str(path)])}.")
    content = _read(path, where)
    named = (content.get("__module__"), content.get("__class__", content.get("__function__")))
    kind = str(named[1]) if named != (None, None) else "Metadataset"
    if named != (None, None) and (named[0] != DATASET_CLASS[0] or kind not in _LISTS or "__function__" in content):
        raise ValueError(
            f"{where} names {_code_name(content)}, which a blend file must not: it is `__module__: megatron.energon` "
            f"with `__class__: MetadatasetV2`, and nothing else is loaded."
        )
    _known(content, ("__module__", "__class__", "splits"), where, ("splits",))
    _no_code(content["splits"], where)
    splits = _mapping(content["splits"], f"{where}: `splits`")
    for name, split in splits.items():
        yield name, _check_split_of(path, name, split, kind, f"{where}: split `{name}`", (*parents, str(path)))


def _check_split_of(path: EPath, name: str, split: Any, kind: str, where: str, parents: tuple[str, ...]) -> str | None:
    """Checks a split of a metadataset, and returns its kind of list (None for a single source)."""
    _mapping(split, where)
    lists = _LISTS[kind]
    found = [key for key in lists if key in split]
    if not found and kind == "MetadatasetV2" and "path" in split:
        return _check_reference(path, name, split, kind, None, where, parents)
    others = ("subset",) if kind == "MetadatasetV2" else ()
    if "join" in split:
        raise ValueError(f"{where} has a `join`, which megatron_smar does not read: give a `blend` or a `path`.")
    _known(split, (*lists, *others), where)
    if len(found) != 1:
        raise ValueError(f"{where} must have one of {_names(lists)}, not {_names(found) if found else 'none of them'}.")
    _check_subset(split, where)
    sources, share = split[found[0]], lists[found[0]]
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"{where}: `{found[0]}` must be a list of sources, not {_shown(sources)}.")
    labels = [f"{where}, source {number} ({_shown_path(source)})" for number, source in enumerate(sources, 1)]
    total = 0.0
    for source, label in zip(sources, labels, strict=True):
        total += _share(source, share, label)
    if not total:
        raise ValueError(f"{where}: the {share} of every source is 0, so that nothing is left to read.")
    if not math.isfinite(total):
        raise ValueError(f"{where}: the {share}s add up to {total}: give smaller {share}s.")
    for source, label in zip(sources, labels, strict=True):
        if source.get(share, 1) == 0:
            _known(source, (*_REFERENCE, *_OWN[kind], share), label)
            continue
        inner = _check_reference(path, name, source, kind, share, label, parents)
        if inner is not None and (inner == "blend_epochized") != (found[0] == "blend_epochized"):
            raise ValueError(
                f"{label} is a `{inner}`, which cannot be part of a `{found[0]}`: use only one of the two kinds."
            )
    return found[0]


def _share(source: Any, share: str, where: str) -> float:
    """Returns a source's weight or repetitions, checked to be a non-negative number."""
    _mapping(source, where)
    other = {"weight": "repetitions", "repetitions": "weight"}[share]
    if other in source:
        raise ValueError(f"{where} has `{other}`, but in this list a source has `{share}`.")
    value = source.get(share, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {share} is {_shown(value)}, but must be a number.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: {share} is {value}, but must not be negative; 0 switches the source off.")
    return float(value)


def _check_reference(
    path: EPath, split: str, source: Mapping[str, Any], kind: str, share: str | None, where: str, parents: Any
) -> str | None:
    """Checks a source; if it is a metadataset, returns the kind of list of the split that it names, else None."""
    for name in ("join", "joiner", "aux"):
        if name in source:
            raise ValueError(f"{where} has `{name}`, which megatron_smar does not read: leave it out.")
    _known(source, (*_REFERENCE, *_OWN[kind], *([share] if share else [])), where, ("path",))
    for name in ("path", "split_part", "dataset_config", "split_config", "subflavor"):
        value = source.get(name)
        if (value is not None or name == "path") and not (isinstance(value, str) and value):
            raise ValueError(f"{where}: {name} is {_shown(value)}, but must be text.")
    epochs = source.get("shuffle_over_epochs_multiplier", 1)
    if epochs is not None and (
        isinstance(epochs, bool) or not isinstance(epochs, int) or not (epochs > 0 or epochs == -1)
    ):
        raise ValueError(
            f"{where}: shuffle_over_epochs_multiplier is {_shown(epochs)}, but must be a whole number from 1, or -1."
        )
    if source.get("subflavors") is not None:
        _mapping(source["subflavors"], f"{where}: subflavors", empty=True)
    _check_subset(source, where)
    place, wanted = _resolve(path, source["path"], where), source.get("split_part") or split
    if not place.name.endswith(".yaml"):
        _check_folder(place, source, where)
        _check_split(place, source.get("split_config"), wanted, where)
        return None
    if source.get("dataset_config") or source.get("split_config"):
        raise ValueError(f"{where} is a metadataset, which takes no dataset_config and no split_config.")
    if not _is_file(place, where):
        raise ValueError(f"{where} does not exist: there is no {place}.")
    splits = dict(_metadataset(place, where, parents))
    if wanted not in splits:
        raise ValueError(f"{where} has no split `{wanted}`, only {_names(splits)}.")
    return splits[wanted]


def _check_subset(source: Mapping[str, Any], where: str) -> None:
    """Checks `subset`, e.g. `{range: [25%, 75%]}`, with energon's own parser."""
    subset = source.get("subset")
    if subset is None:
        return
    _known(_mapping(subset, f"{where}: subset"), ("range",), f"{where}: subset", ("range",))
    ends = subset["range"]
    try:
        if not isinstance(ends, list) or len(ends) != 2:
            raise ValueError("it needs a start and an end")
        chosen = Subset(range=(ends[0], ends[1])).as_dataset_subset()
        start, end = chosen.absolute_range or chosen.range
        if start < 0 or (end is not None and start >= end):
            raise ValueError("nothing is between its ends")
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: subset has the range {_shown(ends)} ({error}): give two shares ([25%, 75%]) or two numbers of "
            "samples ([100, 200])."
        ) from error


def _check_folder(place: EPath, source: Mapping[str, Any], where: str) -> None:
    """Checks that a folder contains shards, and that reading their samples needs no class but `DATASET_CLASS`.

    Args:
        place: The folder.
        source: The folder's entry in a metadataset, which may name other files than `dataset.yaml` and `split.yaml`.
        where: Name of the folder in error messages.
    """
    config = source.get("dataset_config") or "dataset.yaml"
    try:
        present = check_dataset_info_present(place)
    except Exception as error:  # each kind of storage has its own errors
        raise ValueError(f"{where} cannot be read ({reason(error)}): check the address and the credentials.") from error
    if not present:
        missing = (
            "does not exist" if place.is_local() and not place.local_path().exists() else "holds no prepared shards"
        )
        raise ValueError(f"{where} {missing}: {place} has no {META_FOLDER}/.info.json; {PREPARE}.")
    meta = place / META_FOLDER
    content = _read(meta / config, f"{where}: {meta / config}")
    if (content.get("__module__"), content.get("__class__")) != DATASET_CLASS:
        raise ValueError(
            f"{where}: {meta / config} names {_code_name(content)}, but the only class that is loaded from a folder of "
            f"data is {'.'.join(DATASET_CLASS)}; {PREPARE}."
        )
    _known(content, ("__module__", "__class__", "subflavors"), f"{where}: {meta / config}")
    _no_code(content.get("subflavors"), f"{where}: {meta / config}")
    for name in [source["split_config"]] if source.get("split_config") else ["split.yaml"]:
        if name.endswith(".yaml") and _is_file(meta / name, where):
            _read(meta / name, f"{where}: {meta / name}")


def _check_split(place: EPath, split_config: str | None, split: str, where: str) -> None:
    """Checks that a folder has the split, and that it contains shards."""
    try:
        WebdatasetMeta.from_config(path=place, split_part=split, split_config=split_config)
    except Exception as error:  # energon's checks are assertions, and each kind of storage has its own errors
        what = f"no shard {error} that its split file names" if isinstance(error, KeyError) else reason(error)
        raise ValueError(f"{where} has no split `{split}` that can be read ({what}): {PREPARE}.") from error


def _read(path: EPath, where: str) -> dict[str, Any]:
    """Reads a YAML file as energon does, after checking what energon ignores: tags, aliases and repeated keys."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except Exception as error:  # each kind of storage has its own errors
        raise ValueError(f"{where} cannot be read ({reason(error)}).") from error
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError(f"line {_line(event)} has an anchor or alias (& or *), which energon does not resolve")
        documents = list(yaml.compose_all(text, Loader=_LOADER))
        for document in documents:
            _check_node(document)
        content = load_yaml(data) if len(documents) == 1 else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where} is not YAML ({place}{getattr(error, 'problem', None) or reason(error)}).") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply.") from error
    except Exception as error:
        raise ValueError(f"{where} cannot be read by energon ({reason(error)}).") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{where} must hold names and values, not {'several documents' if len(documents) > 1 else _shown(content)}."
        )
    return content


def _check_node(node: yaml.Node) -> None:
    if not _PLAIN_TAG.fullmatch(node.tag):
        raise ValueError(
            f"line {_line(node)} has the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}, and tags are not read"
        )
    if isinstance(node, yaml.ScalarNode) and not (node.value or node.style):
        raise ValueError(f"line {_line(node)} has a name without a value")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item)
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            _check_node(key)
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise ValueError(f"line {_line(key)}: the name `{key.value}` appears twice in one place")
                names.add(key.value)
            _check_node(value)


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _no_code(value: Any, where: str) -> None:
    """Refuses everything that energon would import, at any depth."""
    if isinstance(value, dict):
        if any(name in value for name in _CODE):
            raise ValueError(f"{where} names {_code_name(value)}, which a data file must not: leave it out.")
        for item in value.values():
            _no_code(item, where)
    if isinstance(value, list):
        for item in value:
            _no_code(item, where)


def _code_name(content: Mapping[str, Any]) -> str:
    named = [content.get("__module__"), content.get("__class__", content.get("__function__"))]
    return "the class " + ".".join(str(part) for part in named if part is not None) if any(named) else "no class"


def _known(content: Mapping[str, Any], known: tuple[str, ...], where: str, needed: tuple[str, ...] = ()) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {_names(known)}."
            raise ValueError(f"{where} has the unknown key `{name}`: {hint}")
    for name in needed:
        if name not in content:
            raise ValueError(f"{where} has no `{name}`.")


def _mapping(value: Any, where: str, empty: bool = False) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not (value or empty):
        raise ValueError(f"{where} must hold names and values, not {_shown(value)}.")
    return value


def _resolve(file: EPath, path: str, where: str = "") -> EPath:
    """Resolves a path in a metadataset; a relative path starts from the metadataset's folder."""
    check_address(path, where)
    try:
        return EPath(energon_path(path)) if "://" in path else file.parent / path
    except Exception as error:  # an address that no kind of storage accepts
        raise ValueError(f"{where} names storage that cannot be used ({reason(error)}).") from error


def _is_file(path: EPath, where: str) -> bool:
    try:
        return path.is_file()
    except Exception as error:  # each kind of storage has its own errors
        raise ValueError(f"{where} cannot be read ({reason(error)}): check the address and the credentials.") from error


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "nothing" if value is None else "an empty list"
    kind = "the text " if isinstance(value, str) else "the list " if isinstance(value, list) else ""
    return kind + ("the mapping " if isinstance(value, dict) else "") + repr(value)[:80]


def _shown_path(source: Any) -> str:
    return redacted(str(source.get("path", "no path"))) if isinstance(source, dict) else _shown(source)
