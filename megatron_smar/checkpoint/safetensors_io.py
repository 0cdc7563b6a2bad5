# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Hugging Face folders of safetensors, one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from megatron_smar.checkpoint.folders import first_few

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        name: The tensor's name in the file.
        shape: The tensor's shape.
        dtype: The tensor's data type.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """Returns the tensor, or `length` of its rows from `start`; memory-mapped, so data is read when it is used.

        The file is opened anew for each read: while a file stays open, everything read from it counts as resident
        memory.
        """
        with safe_open(self.file, framework="pt") as file:
            if start is None or (start, length) == (0, self.shape[0]):
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[start : start + length]


def read_folder(folder: Path) -> dict[str, Stored]:
    """Lists the tensors of a Hugging Face folder by name; reads the files' headers only.

    Raises:
        ValueError: The folder has no safetensors, or those of several models, or an index that does not match its
            files, or a damaged file.
    """
    files, weight_map = weight_files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _read_header(file).items():
            if name in tensors:
                raise ValueError(
                    f"{folder}: {name} is in both {tensors[name].file.name} and {file.name}, and nothing says which of "
                    "the two is the model's; take away the file that is not, or fetch the folder again."
                )
            tensors[name] = stored
    for name, place in weight_map.items():
        if name not in tensors or tensors[name].file != folder / place:
            raise ValueError(
                f"the index in {folder} says that {name} is in {place}, which does not hold it: they are not of "
                "one model; fetch the folder again."
            )
    return tensors


def _read_header(file: Path) -> dict[str, Stored]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                part = opened.get_slice(name)
                tensors[name] = Stored(file, name, tuple(part.get_shape()), NAMES[part.get_dtype()])
    except KeyError as error:
        raise ValueError(f"{file} holds tensors of the type {error}, which cannot be converted.") from error
    except Exception as error:  # safetensors raises its own exception, which derives from Exception directly
        raise ValueError(f"{file} is not a complete safetensors file ({error}); fetch it again.") from error
    return tensors


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Chooses the weight files of a folder the way transformers does, and reads their index.

    The order is transformers' own: the file that config.json names in `transformers_weights`, else
    `model.safetensors`, else the files that the index names. Without any of these, safetensors of other names are
    taken if they are one model's, which transformers does not do. Files that are left out are printed.

    Returns:
        The files, and the name of each tensor's file as the index has it; empty without an index.

    Raises:
        ValueError: There are no weight files, or those of several models, or some are missing.
    """
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} has {ADAPTER}: an adapter, which is not part of the weights beside it; merge it into the model "
            "(peft's merge_and_unload) and save_pretrained() that."
        )
    chosen = _named_in_config(folder) or next((folder / n for n in (SINGLE, INDEX) if (folder / n).is_file()), None)
    weight_map = {} if chosen is None or chosen.suffix != ".json" else _read_index(chosen)
    if weight_map:
        files = sorted({folder / place for place in weight_map.values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{chosen} names {first_few(missing)}, which is missing; fetch the folder again.")
    else:
        files = [chosen] if chosen is not None else _one_set(folder)
    spare = [path.name for path in sorted(folder.glob("*.safetensors")) if path not in files]
    spare += [INDEX] if (folder / INDEX).is_file() and chosen != folder / INDEX else []
    if spare:
        read, skipped = (chosen or files[0]).name, first_few(spare)
        tqdm.write(f"{folder}: {read} is read, as transformers does; left out: {skipped}.")
    return files, weight_map


def _named_in_config(folder: Path) -> Path | None:
    """Returns the file that config.json asks transformers to load, or None."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # no config, or a broken one, which is refused where it is read
    if name is None:
        return None
    path = folder / str(name)
    if not str(name).endswith((".safetensors", ".safetensors.index.json")) or not _is_inside(str(name)):
        raise ValueError(
            f"{folder}/config.json names {name!r} as transformers_weights; only safetensors next to it are read."
        )
    if not path.is_file():
        raise ValueError(f"{folder}/config.json names {name} as transformers_weights, which is missing; fetch it.")
    return path


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [place for place in weight_map.values() if not _is_inside(place)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({error!r}); fetch it again.") from error
    if outside or not weight_map:
        problem = f"it names {outside[0]}, outside its folder" if outside else "it names no file"
        raise ValueError(f"{path} is not an index of safetensors files ({problem}); fetch it again.")
    return dict(weight_map)


def _is_inside(name: str) -> bool:
    """Returns whether a relative path stays within its folder."""
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def _one_set(folder: Path) -> list[Path]:
    """Returns the safetensors of a folder that must be one model's: one file, or all of its shards.

    Raises:
        ValueError: There are none, or those of several models, or shards are missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} must hold the model's weights as *.safetensors, but it has none; other formats can run code "
            "when they are opened: load the model with transformers where it comes from, and save_pretrained() it."
        )
    parts = [SHARD.fullmatch(file.name) for file in files]
    sets = {(part[1], int(part[3])) if part else (file.name, 1) for part, file in zip(parts, files, strict=True)}
    if len(sets) > 1 or next(iter(sets))[1] != len(files):
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}, and {first_few(file.name for file in files)} are not all the "
            f"files of one model; fetch the folder again, or rename the model's file to {SINGLE}."
        )
    return files


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    progress: Callable[[int], Any],
    max_shard_size: str = "5GB",
) -> None:
    """Writes safetensors files, split as `save_pretrained` splits them, holding one tensor in memory at a time.

    The safetensors library needs all of a file's tensors in one call. The format is simple enough to write here: the
    header's length, a JSON header and the data.

    Args:
        folder: Folder to write to.
        tensors: Shape and data type of each tensor, by name.
        read: Returns a tensor by name.
        progress: Called with the number of bytes of each tensor written.
        max_shard_size: Largest size of a file, such as "5GB".
    """
    like = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    split = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        with open(folder / filename, "wb") as file:
            header = _header({name: like[name] for name in names})
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                tensor = read(name).to(like[name].dtype).contiguous()
                if tensor.shape != like[name].shape:
                    raise RuntimeError(f"{name} was read as {list(tensor.shape)}, not {list(like[name].shape)}")
                file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")
                progress(tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _header(tensors: dict[str, Tensor]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(content, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # the format aligns the data to 8 bytes
