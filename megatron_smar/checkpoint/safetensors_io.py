# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders of safetensors, read and written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from megatron_smar.checkpoint.folders import some

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
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
    """A tensor in a file.

    Attributes:
        file: The file.
        name: Its name there.
        shape: Its shape.
        dtype: Its data type.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """The tensor, or `length` of its rows from `start`; memory-mapped, so nothing is read before it is used.

        The file is opened for each: a file that stays open counts all that was read of it as resident memory.
        """
        with safe_open(self.file, framework="pt") as file:
            if start is None or (start, length) == (0, self.shape[0]):
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[start : start + length]


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder by name; from the files' headers, no data is read.

    Raises:
        ValueError: It has no safetensors, an index that names a missing file, or a damaged file.
    """
    files = _weight_files(folder)
    if not files:
        raise ValueError(
            f"{folder} must hold the model's weights as *.safetensors, but it has none; other formats can run code "
            "when they are opened: load the model with transformers where it comes from, and save_pretrained() it."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder / INDEX} names {some(missing)}, missing beside it; fetch the folder again.")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no dictionary
                    part = opened.get_slice(name)
                    tensors[name] = Stored(file, name, tuple(part.get_shape()), NAMES[part.get_dtype()])
        except KeyError as error:
            raise ValueError(f"{file} holds tensors of the type {error}, which cannot be converted.") from error
        except Exception as error:  # safetensors has an exception of its own, a plain Exception
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch it again.") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers would read: of the index, or the one that needs none, or whatever there is."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}); fetch it again.") from error


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    progress: Callable[[int], Any],
    max_shard_size: str = "5GB",
) -> None:
    """Writes safetensors files, cut as `save_pretrained` cuts them, holding one tensor at a time.

    The library's own writer wants all of a file's tensors at once; the format is a length, a JSON header and the data.

    Args:
        folder: Where to.
        tensors: Shape and data type of each.
        read: Gives a tensor by name.
        progress: Called with the bytes of each tensor.
        max_shard_size: Most bytes per file, such as "5GB".
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
    return header + b" " * (-len(header) % 8)  # the data begins at a multiple of 8
