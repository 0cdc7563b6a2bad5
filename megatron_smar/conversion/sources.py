# SPDX-License-Identifier: Apache-2.0
"""Reads what can become a checkpoint: a composite model's folder, or a language model and a vision encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PretrainedConfig

from megatron_smar.checkpoint.folders import copy_companions
from megatron_smar.checkpoint.safetensors_io import read_folder
from megatron_smar.conversion import composite, original_layouts
from megatron_smar.conversion.architectures import Flags
from megatron_smar.conversion.weights import Weight
from megatron_smar.data.tokens import IMAGE_CONTEXT, add_tokens
from megatron_smar.routing.strategies.modality_gates import ModalityGatesConfig

# Files that are copied from the folder of a model in an original layout, besides its tokenizer.
COMPANIONS = ("preprocessor_config.json", "generation_config.json")
# An imported model with a gate per modality; its table of biases has the experts that each may choose.
ROUTING_OF_GATES: Flags = {"modality-routing": ModalityGatesConfig.name}
CONNECTOR_SEED = 1234  # also upcycling's and the trainer's default


class Readable(Protocol):
    """A tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's data type."""

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """Returns the tensor, or `length` of its rows from `start`."""


@dataclass(frozen=True)
class Source:
    """A model to be converted to a checkpoint of the trainer.

    Attributes:
        config: The composite model's config.
        tensors: The stored tensors, by their names in the table.
        table: The weight table: how the checkpoint's weights are made of the stored tensors.
        flags: The trainer's flags for the model.
        folders: Folders with tokenizer and processor; of several files with one name, the first is used.
    """

    config: PretrainedConfig
    tensors: Mapping[str, Readable]
    table: list[Weight]
    flags: Flags
    folders: tuple[Path, ...]


def read_composite(folder: Path, vision: Path | None = None, scratch: Path | None = None) -> Source:
    """Reads a composite model's folder, whether published or exported by this project.

    Args:
        folder: The model's folder.
        vision: Folder of the vision tower, for a layout that keeps it in another folder (VITA's).
        scratch: Folder for the tokenizer, for layouts of `original_layouts`; must exist as long as the source is used.

    Raises:
        ValueError: The model is of another kind, or damaged.
    """
    content = composite.read_content(folder)
    layout = original_layouts.LAYOUTS.get(content.get("model_type", ""))
    if layout is not None and scratch is not None:
        return _read_original(folder, content, layout, vision, scratch)
    config = composite.load_composite(folder)
    if vision is not None:
        raise composite.UnsupportedError(f"--hf {folder} has its vision tower in it; leave --vision out.")
    tensors = {composite.canonical(name): tensor for name, tensor in read_folder(folder).items()}
    biases = any(name.endswith(".modality_bias") for name in tensors)
    gates = any(composite.MODALITY_GATE in name for name in tensors)
    flags = composite.flags(config) | (ROUTING_OF_GATES if gates else {})
    return Source(config, tensors, composite.weights(config, biases, gates=gates), flags, (folder,))


def read_parts(
    language: Path,
    vision: Path,
    connection: composite.Connection,
    tokenizer: Path,
    scratch: Path,
    seed: int = CONNECTOR_SEED,
) -> Source:
    """Reads a language model and a vision encoder, and adds a new connector between them.

    Image tokens that the tokenizer lacks are added to it, and rows for them to the vocabulary.

    Args:
        language: Folder of a causal language model.
        vision: Folder of a vision encoder, or of a model with a vision encoder.
        connection: How vision features reach the language model.
        tokenizer: Folder of a Hugging Face tokenizer, or a SentencePiece model.
        scratch: Folder for the tokenizer; must exist as long as the source is used.
        seed: Seed of the connector's weights.

    Raises:
        ValueError: One of the parts cannot be used.
    """
    text, tower = composite.load_config(language), read_tower(vision)
    image_token_id, vocab_size = _with_image_tokens(tokenizer, scratch)
    config = composite.combine(text, tower.config, connection, image_token_id, vocab_size)
    stored = read_folder(language)
    names = composite.part_of(stored, composite.LANGUAGE)
    tensors = {internvl: stored[name] for name, internvl in names.items()} | tower.tensors
    table = composite.weights(config, biases=False, connector_seed=seed)
    table = _stored_rows(_with_tower(table, tower.table), text.vocab_size)
    # Other files there belong to the tokenizer without image tokens, or to the model that the tower was taken from.
    companions = (vision / "preprocessor_config.json", language / "generation_config.json")
    return Source(config, tensors, table, composite.flags(config), (scratch, *companions))


@dataclass(frozen=True)
class Tower:
    """A vision tower in a folder.

    Attributes:
        config: The tower's config, of transformers' class.
        tensors: The stored tensors, by their names in the table.
        table: How the checkpoint's weights are made of the stored tensors.
    """

    config: PretrainedConfig
    tensors: dict[str, Readable]
    table: list[Weight]


def read_tower(folder: Path) -> Tower:
    """Reads a vision encoder, or the one in a composite model; InternViT also in its original layout."""
    content = composite.read_content(folder)
    if original_layouts.is_tower(content):
        config: PretrainedConfig = original_layouts.tower_config(content.get("vision_config", content))
        prefix = original_layouts.INTERNVL.tower if "vision_config" in content else ""
        own = {name: tensor for name, tensor in read_folder(folder).items() if name.startswith(prefix)}
        tensors: dict[str, Readable] = {composite.VISION + name: tensor for name, tensor in own.items()}
        return Tower(config, tensors, original_layouts.tower_weights(config, composite.VISION + prefix))
    config = composite.tower_of(composite.load_config(folder))
    stored = read_folder(folder)
    names = composite.part_of(stored, composite.VISION, config)
    tensors = {internvl: stored[name] for name, internvl in names.items()}
    return Tower(config, tensors, composite.vision_weights(config))


def _with_tower(table: list[Weight], tower: list[Weight]) -> list[Weight]:
    """Returns a composite model's table with the vision tower's rows replaced."""
    own = {row.megatron: row for row in tower}
    return [own.get(row.megatron, row) for row in table]


def _stored_rows(table: list[Weight], vocab_size: int) -> list[Weight]:
    """Returns a table whose vocabulary has `vocab_size` rows on disk, and grows to the model's vocabulary."""
    return [replace(row, rows=vocab_size) if row.rows else row for row in table]


def _read_original(
    folder: Path, content: original_layouts.Content, layout: original_layouts.Layout, vision: Path | None, scratch: Path
) -> Source:
    """Reads a composite model in a layout of `original_layouts`."""
    tensors: dict[str, Readable] = dict(read_folder(folder))
    left_out = [name for name in tensors if layout.left_out and name.startswith(layout.left_out)]
    for name in left_out:
        del tensors[name]
    text, connection = layout.text_config(content, tensors), layout.connection(content)
    tower = _original_tower(folder, content, layout, vision, tensors)
    tokenizer = scratch / "with_image_tokens"
    image_token_id, vocab_size = _with_image_tokens(_copy_tokenizer(folder, scratch), tokenizer)
    config = composite.combine(text, tower.config, connection, image_token_id, vocab_size)
    table = _stored_rows(_with_tower(layout.weights(config), tower.table), text.vocab_size)
    flags = composite.flags(config) | layout.tiles(content)
    if left_out:
        tqdm.write(f"{folder}: {len(left_out)} weights {layout.left_out}* are left out; the trainer has no audio.")
    # Other tokenizer files there lack the image tokens.
    companions = [place / name for place in (folder, vision or folder) for name in COMPANIONS]
    return Source(config, tensors | tower.tensors, table, flags, (tokenizer, *companions))


def _original_tower(
    folder: Path,
    content: original_layouts.Content,
    layout: original_layouts.Layout,
    vision: Path | None,
    names: Collection[str],
) -> Tower:
    """Reads the vision tower of a model in an original layout.

    Tower weights in the model's own folder take precedence over those in the folder that --vision names.
    """
    if "vision_config" in content:
        if vision is not None:
            raise composite.UnsupportedError(f"--hf {folder} has its vision tower in it; leave --vision out.")
        config: PretrainedConfig = original_layouts.tower_config(content["vision_config"])
        return Tower(config, {}, original_layouts.tower_weights(config, layout.tower))
    if vision is None:
        raise composite.UnsupportedError(
            f"--hf {folder} is a {content['model_type']} model, whose config.json only names its vision tower "
            f"({content.get('mm_vision_tower')!r}); give that model's folder as --vision."
        )
    tower = read_tower(vision)
    if tower.config.model_type != "internvl_vision":
        raise composite.UnsupportedError(
            f"--vision {vision} is a tower of the type {tower.config.model_type}; a {content['model_type']} model has "
            "an InternViT (VITA: InternViT-300M-448px)."
        )
    if any(name.startswith(layout.tower) for name in names):
        return Tower(tower.config, {}, original_layouts.tower_weights(tower.config, layout.tower))
    return tower


def _copy_tokenizer(folder: Path, scratch: Path) -> Path:
    """Copies a folder's tokenizer without config.json: if that names code, transformers would offer to run it."""
    copy = scratch / "tokenizer"
    copy.mkdir()
    copy_companions([folder], copy)
    return copy


def _with_image_tokens(tokenizer: Path, scratch: Path) -> tuple[int, int]:
    """Writes a tokenizer with the image tokens; returns the id of the image placeholder and the vocabulary's size."""
    if tokenizer.is_dir():
        try:
            add_tokens(tokenizer, scratch)
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}; give another as --tokenizer-model: the folder of a Hugging Face tokenizer, "
                "or a SentencePiece model."
            ) from error
        extended = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        return extended.get_vocab()[IMAGE_CONTEXT], len(extended)
    add_tokens(tokenizer, scratch / "tokenizer.model")
    pieces = SentencePieceProcessor(model_file=str(scratch / "tokenizer.model"))
    return pieces.piece_to_id(IMAGE_CONTEXT), pieces.get_piece_size()
