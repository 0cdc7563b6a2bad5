# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face model as a torch_dist checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from tqdm import tqdm

from megatron_smar.checkpoint.folders import ConversionError, copy_companions, first_few, whole_or_nothing
from megatron_smar.checkpoint.tokenizer_identity import fingerprints_of_folder
from megatron_smar.checkpoint.torch_dist import Shard, write_checkpoint
from megatron_smar.conversion import composite
from megatron_smar.conversion.empty_model import describe_model, write_flags
from megatron_smar.conversion.outcome import Written
from megatron_smar.conversion.sources import Readable, Source
from megatron_smar.conversion.weights import Piece, Weight, pieces_of

TIED, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def write_model(source: Source, output: Path, dtype: torch.dtype | None = None) -> Written:
    """Writes a model as a checkpoint for --load.

    Args:
        source: The model.
        output: The new folder. It gets the checkpoint, `flags.txt` with the model's flags, and `hf/` with its config,
            tokenizer and processor.
        dtype: Data type of the written weights; None keeps each weight's own.

    Returns:
        Number and size of the weights written.

    Raises:
        ConversionError: A weight is missing, unexpected or of another shape, or `output` cannot be written.
    """
    check_names(source)
    args, tensors, objects = describe_model(source.config, source.flags)
    args.vision_model = str((output / "hf").absolute())
    args.true_vocab_size = source.config.text_config.vocab_size  # rows beyond it in a run are padding
    shards = list(shards_of(source, tensors, dtype))
    needed = sum(torch.Size(shard.sizes).numel() * shard.dtype.itemsize for shard in shards)
    with whole_or_nothing(output, needed) as folder:
        (folder / "hf").mkdir()
        copy_companions(source.folders, folder / "hf")
        source.config.save_pretrained(folder / "hf")
        write_flags(folder / "flags.txt", source.flags)
        args.tokenizer_fingerprints = fingerprints_of_folder(folder / "hf")
        with tqdm(total=needed, unit="B", unit_scale=True, desc=f"writing {output}") as bar:
            write_checkpoint(folder, shards, objects, args, bar.update)
    return Written.of(len(source.table), [(shard.sizes, shard.dtype) for shard in shards])


def check_names(source: Source) -> None:
    """Compares the source's tensors with those that the table reads.

    Raises:
        ConversionError: Tensors are missing or unexpected; the message lists them.
    """
    read = {name for row in source.table for name in row.hf}
    missing = sorted(read - set(source.tensors))
    unexpected = sorted(name for name in set(source.tensors) - read if not composite.COMPUTED.fullmatch(name))
    if source.config.text_config.tie_word_embeddings and TIED in unexpected:
        unexpected.remove(TIED)
        one, other = source.tensors[TIED].read(), source.tensors[EMBEDDING].read()
        kind = torch.promote_types(one.dtype, other.dtype)
        if not torch.equal(one.to(kind), other.to(kind)):
            raise ConversionError(
                f"config.json says tie_word_embeddings, but {TIED} differs from {EMBEDDING}; nothing was written. "
                "Correct the one that is wrong."
            )
    problems = [
        f"{len(names)} {what}: {first_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ConversionError(
            f"the weights are not those of a {source.config.text_config.model_type} model as its config.json describes "
            f"it ({'; '.join(problems)}); nothing was written."
        )


def shards_of(source: Source, tensors: dict[str, list[ShardedTensor]], dtype: torch.dtype | None) -> Iterator[Shard]:
    """Yields the shards to write, each with a function that reads its data.

    Args:
        source: The model.
        tensors: The checkpoint's weights by name, with their parts.
        dtype: Data type of the written weights; None keeps each weight's own.

    Raises:
        ConversionError: A weight does not have the shape of the checkpoint's.
    """
    rows = {row.megatron: row for row in source.table}
    if set(rows) != set(tensors):
        raise RuntimeError(f"the table and the trainer's model differ: {first_few(sorted(set(rows) ^ set(tensors)))}")
    problems = []
    kinds = dtypes_of(source, tensors, dtype)
    for name, parts in tensors.items():
        row = rows[name]
        shape = tuple(parts[0].global_shape[parts[0].prepend_axis_num :])
        problems += [_shape_problem(row, shape, source.tensors), _dtype_problem(row, parts[0].dtype, source.tensors)]
        for part in parts:
            axes, kind = part.prepend_axis_num, kinds[part.key]
            local = tuple(part.local_shape)
            start = part.global_offset[axes]
            read = partial(read_rows, row, source.tensors, start, local, shape[0], kind)
            sizes = (1,) * axes + local
            yield Shard(part.key, tuple(part.global_offset), sizes, tuple(part.global_shape), kind, read)
    if any(problems):
        raise ConversionError(
            f"the weights do not fit the model that config.json describes: {first_few(filter(None, problems))}; "
            "nothing was written."
        )


def dtypes_of(
    source: Source, tensors: dict[str, list[ShardedTensor]], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Returns the data type of each of the checkpoint's tensors: the widest of all that it is made of.

    A checkpoint stores the weights of one kind of all layers and experts as one tensor, which has one data type.

    Args:
        source: The model.
        tensors: The checkpoint's weights by name, with their parts.
        wanted: Data type that --dtype asks for; None keeps each weight's own.
    """
    kinds: dict[str, torch.dtype] = {}
    for row in source.table:
        like = (
            row if row.hf else next(other for other in source.table if other.hf)
        )  # a new weight gets the type of the others
        stored = reduce(torch.promote_types, (source.tensors[name].dtype for name in like.hf))
        kind = row.converted(wanted, stored)
        for part in tensors[row.megatron]:
            kinds[part.key] = torch.promote_types(kinds.get(part.key, kind), kind)
    return kinds


def read_rows(
    row: Weight, tensors: Mapping[str, Readable], start: int, shape: tuple[int, ...], length: int, dtype: torch.dtype
) -> Tensor:
    """Reads consecutive rows of a Megatron weight, assembled from Hugging Face tensors.

    Args:
        row: The weight's row in the table.
        tensors: Hugging Face tensors by name.
        start: First row to read.
        shape: Shape of the part to read.
        length: Number of rows of the full weight.
        dtype: Data type of new weights.
    """
    if row.make is not None:
        return row.make(torch.Size((length, *shape[1:])), dtype)[start : start + shape[0]]
    have = row.rows if row.rows is not None else length
    if start + shape[0] > have:
        return _grow(tensors[row.hf[0]], have, shape)
    parts = [_read(piece, tensors) for piece in pieces_of(row, start, shape[0])]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows if row.change is None else row.change(rows, start)


def _read(piece: Piece, tensors: Mapping[str, Readable]) -> Tensor:
    return tensors[piece.name].read(piece.start, piece.length)


def _grow(tensor: Readable, have: int, shape: tuple[int, ...]) -> Tensor:
    """Reads a vocabulary and appends rows for new tokens, initialized to the mean of the other rows."""
    rows = torch.empty(shape, dtype=tensor.dtype)
    total = torch.zeros(shape[1:])
    for start in range(0, have, 4096):  # read in one call, it would be in memory twice
        part = tensor.read(start, min(4096, have - start))
        rows[start : start + len(part)] = part
        total += part.sum(dim=0, dtype=torch.float32)
    rows[have:] = total / have
    return rows


def _shape_problem(row: Weight, shape: tuple[int, ...], tensors: Mapping[str, Readable]) -> str:
    """Describes the first tensor of a table row that has a wrong shape; empty if there is none.

    A tensor must have as many rows as its last run ends at; without runs, `row.rows`, or as many as the weight has.
    """
    for source, name in enumerate(row.hf):
        rows = max((run.start + run.length for run in row.runs if run.source == source), default=row.rows or shape[0])
        have = tuple(tensors[name].shape)
        if have != (rows, *shape[1:]):
            return f"{name} is {list(have)}, not {[rows, *shape[1:]]}"
    return ""


def _dtype_problem(row: Weight, dtype: torch.dtype, tensors: Mapping[str, Readable]) -> str:
    """Describes the first tensor of a table row that holds integers where floats belong, or the other way round."""
    kinds = {name: tensors[name].dtype for name in row.hf}
    wrong = (f"{name} is {kind}" for name, kind in kinds.items() if kind.is_floating_point != dtype.is_floating_point)
    return next(wrong, "")
