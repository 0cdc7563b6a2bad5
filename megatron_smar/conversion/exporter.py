# SPDX-License-Identifier: Apache-2.0
"""Exports a torch_dist checkpoint to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from megatron_smar.checkpoint.folders import ConversionError, copy_companions, first_few, whole_or_nothing, without_code
from megatron_smar.checkpoint.metadata import run_arguments, saved_arguments
from megatron_smar.checkpoint.safetensors_io import write_folder
from megatron_smar.checkpoint.torch_dist import CheckpointReader
from megatron_smar.config.build import modality_table
from megatron_smar.conversion import composite
from megatron_smar.conversion.empty_model import describe_model, differing_flags
from megatron_smar.conversion.outcome import Written
from megatron_smar.conversion.processor import write_processor
from megatron_smar.conversion.sources import ROUTING_OF_GATES, Source
from megatron_smar.conversion.weights import Piece, Weight, inverted
from megatron_smar.huggingface import RemoteFields, needs_remote_code, plain_config, write_remote_code
from megatron_smar.routing.strategies import stored_strategy

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def export_model(
    load: Path,
    hf: Path,
    output: Path,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    processor: bool = True,
) -> Written:
    """Writes a checkpoint as a Hugging Face folder.

    The export is a model of a plain transformers class, for any tool, unless it has what that class cannot represent
    (modality biases that are not zero, a gate per modality, a connector without LayerNorm, scaled features). Then it
    comes with modeling code for `trust_remote_code`.

    Args:
        load: The checkpoint's folder.
        hf: A folder with the model's config, tokenizer and processor: the folder that was imported, or the import's
            `hf/`.
        output: The new folder.
        iteration: The checkpoint's step; None for the latest checkpoint.
        dtype: Data type of the exported weights; None keeps each weight's own.
        processor: Whether to write processor, chat template and generation config for the run's arguments.

    Returns:
        Number and size of the weights written.

    Raises:
        ConversionError: The checkpoint holds another model than `hf` describes, or `output` cannot be written, or
            transformers cannot produce the tokens that the model was trained on.
    """
    source = read_checkpoint(load, hf, iteration)
    layout = layout_of(source, dtype)
    needed = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in layout.values())
    with whole_or_nothing(output, needed) as folder:
        describe_export(source, hf, folder, layout)
        if processor and not write_processor(folder, run_arguments(load, iteration), source.config):
            tqdm.write(f"{hf} has no tokenizer, so the export comes without processor and chat template.")
        with tqdm(total=needed, unit="B", unit_scale=True, desc=f"writing {output}") as bar:
            write_folder(folder, layout, lambda name: source.tensors[name].read(), bar.update)
    return Written.of(len(layout), layout.values())


def layout_of(source: Source, dtype: torch.dtype | None = None) -> Layout:
    """Returns shape and data type of each weight of an export.

    Args:
        source: The checkpoint, as `read_checkpoint` returns it.
        dtype: Data type of the exported weights; None keeps each weight's own.
    """
    rows = {name: row for row in source.table for name in row.hf}
    return {name: (t.shape, rows[name].converted(dtype, t.dtype)) for name, t in source.tensors.items()}


def describe_export(source: Source, hf: Path, folder: Path, layout: Layout) -> None:
    """Writes an export's files besides weights and processor: config.json, modeling code, the tokenizer's files.

    Args:
        source: The checkpoint, as `read_checkpoint` returns it.
        hf: A folder with the model's config, tokenizer and processor.
        folder: The export's folder.
        layout: Shape and data type of each weight.
    """
    config, tensors = source.config, source.tensors
    connection = composite.connection_of(config)
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".modality_bias")]
    fields = RemoteFields(
        modality_router_bias=bool(biases),
        modality_gates=any(composite.MODALITY_GATE in name for name in tensors),
        num_modalities=biases[0].shape[0] if biases else RemoteFields.num_modalities,
        projector_layer_norm=connection.connector == "internvl",
        vision_feature_scale=connection.feature_scale,
        lm_head_bias=composite.LANGUAGE + "lm_head.bias" in tensors,
    )
    content = without_code(json.loads((hf / "config.json").read_text(encoding="utf-8")))
    copy_companions([hf], folder)
    remote = needs_remote_code(content, fields)
    content = write_remote_code(folder, content, fields) if remote else plain_config(content)
    content = with_architectures(with_dtype(content, layout))
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def with_architectures(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to config.json the classes of the model's parts, by which vLLM and SGLang choose their own classes.

    Args:
        content: config.json of a composite model; the composite model's own class is in it already.
    """
    text, vision = dict(content["text_config"]), dict(content["vision_config"])
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    vision["architectures"] = [MODEL_MAPPING_NAMES[vision.get("model_type", "internvl_vision")]]
    return dict(content) | {"text_config": text, "vision_config": vision}


def with_dtype(content: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Sets config.json's `dtype` to that of most weights, since transformers loads all weights in this type.

    Args:
        content: config.json of the model, or the config of one of its parts.
        layout: Shape and data type of each weight.
    """
    sizes: Counter[torch.dtype] = Counter()
    for shape, kind in layout.values():
        sizes[kind] += math.prod(shape)
    name = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    own = {field: value for field, value in content.items() if field not in ("dtype", "torch_dtype")}
    parts = {part: with_dtype(own[part], layout) for part in ("text_config", "vision_config") if part in own}
    return own | parts | {"dtype": name}


def read_checkpoint(load: Path, hf: Path, iteration: int | None = None) -> Source:
    """Opens a checkpoint as a source of Hugging Face tensors; modality biases are included if any is not zero.

    Args:
        load: The checkpoint's folder.
        hf: A folder with the model's config.
        iteration: The checkpoint's step; None for the latest checkpoint.

    Raises:
        ValueError: There is no checkpoint, or it holds another model.
    """
    config = composite.load_composite(hf)
    reader = CheckpointReader(load, iteration)
    saved = saved_arguments(reader.common_state)
    allowed = allowed_experts(saved)
    gates, flags = stored_strategy(saved).gate_per_modality, composite.flags(config)
    table = composite.weights(config, has_biases(reader) or bool(allowed), gates=gates)
    args, parts, _ = describe_model(config, flags | (ROUTING_OF_GATES if gates else {}))
    if getattr(saved, "num_experts", None) and "num-experts" not in flags:
        raise ConversionError(
            f"{reader.folder} is a mixture of experts that upcycling made of the {config.text_config.model_type} model "
            f"in {hf}; transformers has no class for it: it can be trained and evaluated here, but not exported."
        )
    if differing := differing_flags(flags, args, saved):
        raise ConversionError(
            f"{reader.folder} was trained as another model than {hf}/config.json describes: {'; '.join(differing)}. "
            "Give the --hf that it started from."
        )
    tensors: dict[str, Any] = as_hugging_face(reader, table, parts)
    for name, bias in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\..*\.modality_bias$", name)
        if layer and int(layer[1]) + 1 in allowed:
            tensors[name] = RestrictedBias(bias, allowed[int(layer[1]) + 1])
    return Source(config, tensors, table, flags, (hf,))


def allowed_experts(saved: Namespace) -> dict[int, Tensor]:
    """Returns the experts that a run's strategy allows each modality.

    Args:
        saved: The run's arguments.

    Returns:
        [M, E] bool by layer, counted from 1; empty if the strategy allows all experts.

    Raises:
        ConversionError: An export would compute something other than the trainer does.
    """
    strategy = stored_strategy(saved)
    named = f"the checkpoint was trained with --modality-routing {strategy.name}"
    if not strategy.exported:
        raise ConversionError(f"{named}, which no export can compute: it can be trained and evaluated here.")
    modalities = modality_table(saved)
    if len(modalities.images) > 1:
        raise ConversionError(
            f"the checkpoint was trained with --image-modalities {' '.join(modalities.images)}, and an export supports "
            "text and vision only: it can be trained and evaluated here."
        )
    layers = range(1, (getattr(saved, "num_layers", None) or 0) + 1) if getattr(saved, "num_experts", None) else ()
    tables = {layer: strategy.allowed(layer, modalities.names, saved.num_experts) for layer in layers}
    found = {layer: table for layer, table in tables.items() if table is not None}
    if found and (saved.moe_router_enable_expert_bias or not saved.modality_router_bias):
        flag = "--no-modality-router-bias" if not saved.modality_router_bias else "--moe-router-enable-expert-bias"
        raise ConversionError(f"{named} and {flag}, for which an export has no place; it can be evaluated here.")
    return found


FORBIDDEN = -1e9  # not -inf, which a product with a one-hot mask turns into NaN; the softmax of both is 0


@dataclass(frozen=True)
class RestrictedBias:
    """A modality bias with a large negative value for each expert that a modality may not choose.

    Attributes:
        bias: The stored bias, [M, E].
        allowed: Whether each modality may choose each expert, [M, E] bool.
    """

    bias: Assembled
    allowed: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The bias's shape."""
        return self.bias.shape

    @property
    def dtype(self) -> torch.dtype:
        """The stored bias's data type."""
        return self.bias.dtype

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """Returns the bias, or `length` of its rows from `start`."""
        bias = self.bias.read().masked_fill(~self.allowed, FORBIDDEN)
        return bias if start is None else bias[start : start + length]


@dataclass(frozen=True)
class Assembled:
    """A Hugging Face tensor that is read from the Megatron weights that hold its rows.

    Attributes:
        shape: The tensor's shape.
        dtype: The data type stored in the checkpoint.
        reader: The checkpoint's reader.
        pieces: The tensor's rows, each with the Megatron weight that holds them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: CheckpointReader
    pieces: tuple[tuple[Piece, ShardedTensor], ...]

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """Returns the tensor, or `length` of its rows from `start`."""
        tensor = self._read_all()
        return tensor if start is None else tensor[start : start + length]

    def _read_all(self) -> Tensor:
        if len(self.pieces) == 1:
            return self._rows(*self.pieces[0], self.shape[0])
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for piece, part in self.pieces:
            tensor[piece.target : piece.target + piece.length] = self._rows(piece, part, piece.length)
        return tensor

    def _rows(self, piece: Piece, part: ShardedTensor, number: int) -> Tensor:
        axes, shape = part.prepend_axis_num, (number, *self.shape[1:])
        place = (*part.global_offset[:axes], piece.start or 0, *[0] * (len(shape) - 1))
        return self.reader.read(part.key, place, (1,) * axes + shape).view(shape)


def as_hugging_face(
    reader: CheckpointReader, table: list[Weight], parts: dict[str, list[ShardedTensor]]
) -> dict[str, Assembled]:
    """Returns a checkpoint's weights under Hugging Face's names and in Hugging Face's shapes.

    Args:
        reader: The checkpoint's reader.
        table: The model's weight table.
        parts: The sharded tensors that the trainer would save of the model, by name.

    Raises:
        ConversionError: The checkpoint holds another model.
    """
    rows = {row.megatron: row for row in table}
    problems = []
    for name, row in rows.items():
        if not row.hf:
            continue  # a modality bias that is zero, or a run without modality biases
        part = parts[name][0]
        if part.key not in reader.tensors:
            problems.append(f"it has no {part.key}")
            continue
        have, expected = tuple(reader.tensors[part.key].size), tuple(part.global_shape)
        if have[1:] != expected[1:] or (have[0] < expected[0] if row.rows else have != expected):
            problems.append(f"{part.key} is {list(have)} there, not {list(expected)}")
    if problems:
        raise ConversionError(
            f"{reader.folder} holds another model than --hf describes: {first_few(dict.fromkeys(problems))}."
        )
    tensors = {}
    for name, pieces in inverted(table).items():
        first = parts[pieces[0].name][0]
        shape = tuple(first.global_shape[first.prepend_axis_num :])
        number = rows[pieces[0].name].rows or shape[0]
        if pieces[0].start is not None:
            number = max(piece.target + piece.length for piece in pieces)
        found = tuple((piece, parts[piece.name][0]) for piece in pieces)
        dtype = reduce(torch.promote_types, (reader.tensors[part.key].properties.dtype for _, part in found))
        tensors[name] = Assembled((number, *shape[1:]), dtype, reader, found)
    return tensors


def has_biases(reader: CheckpointReader) -> bool:
    """Returns whether any modality bias of a checkpoint is not zero."""
    biases = {key: tuple(data.size) for key, data in reader.tensors.items() if key.endswith(".modality_bias.bias")}
    weights = {
        key: size for key, size in biases.items() if key.startswith("language_model.")
    }  # not the optimizer's state
    return any(reader.read(key, (0,) * len(size), size).any() for key, size in weights.items())
