# SPDX-License-Identifier: Apache-2.0
"""What can become a checkpoint: a composite model's folder, or a language model and a vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from megatron_smar.checkpoint import composite
from megatron_smar.checkpoint.architectures import Flags
from megatron_smar.checkpoint.safetensors_io import read_folder
from megatron_smar.checkpoint.weights import Weight
from megatron_smar.data.tokens import IMAGE_CONTEXT, add_tokens


class Readable(Protocol):
    """A tensor somewhere on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its data type."""

    def read(self, start: int | None = None, length: int = 0) -> Tensor:
        """All of it, or some of its rows."""


@dataclass(frozen=True)
class Source:
    """A model that is to become a checkpoint of the trainer.

    Attributes:
        config: Of the composite model.
        tensors: What there is to read, by name in InternVL's layout.
        table: How the checkpoint's weights are made of it.
        flags: Under which the trainer builds the model.
        folders: Where tokenizer and processor lie; the first that has a file gives it.
    """

    config: PretrainedConfig
    tensors: Mapping[str, Readable]
    table: list[Weight]
    flags: Flags
    folders: tuple[Path, ...]


def read_composite(folder: Path) -> Source:
    """A composite model's folder: published, or exported by us.

    Raises:
        ValueError: It is of another kind, or damaged.
    """
    config = composite.load_config(folder)
    if not hasattr(config, "text_config") or not hasattr(config, "downsample_ratio"):
        raise composite.UnsupportedError(
            f"--hf {folder} is a {config.model_type} model; it takes {composite.supported()}. Give a language model "
            "alone as --language, and a vision encoder with it as --vision."
        )
    tensors = {composite.canonical(name): tensor for name, tensor in read_folder(folder).items()}
    biases = any(name.endswith(".modality_bias") for name in tensors)
    return Source(config, tensors, composite.weights(config, biases), composite.flags(config), (folder,))


def read_parts(
    language: Path, vision: Path, connection: composite.Connection, tokenizer: Path, scratch: Path
) -> Source:
    """A language model and a vision encoder, with a fresh connector between them.

    The image tokens are added to the tokenizer where it lacks them, and rows for them to the vocabulary.

    Args:
        language: Folder of a causal language model.
        vision: Folder of a vision encoder, or of a model that has one.
        connection: What lies between them.
        tokenizer: Folder of a Hugging Face tokenizer, or a SentencePiece model.
        scratch: Folder for the tokenizer; the source needs it as long as it is used.

    Raises:
        ValueError: One of them cannot be used.
    """
    text, tower = composite.load_config(language), composite.load_config(vision)
    image_token_id, vocab_size = _with_image_tokens(tokenizer, scratch)
    config = composite.combine(text, tower, connection, image_token_id, vocab_size)
    tensors: dict[str, Readable] = {}
    for folder, part in ((language, composite.LANGUAGE), (vision, composite.VISION)):
        stored = read_folder(folder)
        names = composite.part_of(stored, part, config.vision_config)
        tensors |= {ours: stored[name] for name, ours in names.items()}
    table = composite.weights(config, biases=False, fresh_connector=True)
    table = [replace(row, rows=text.vocab_size) if row.rows else row for row in table]
    return Source(config, tensors, table, composite.flags(config), (scratch, vision))


def _with_image_tokens(tokenizer: Path, scratch: Path) -> tuple[int, int]:
    """Writes a tokenizer with the image tokens; their placeholder's id, and the size of the vocabulary."""
    if tokenizer.is_dir():
        add_tokens(tokenizer, scratch)
        made = AutoTokenizer.from_pretrained(scratch)
        return made.get_vocab()[IMAGE_CONTEXT], len(made)
    add_tokens(tokenizer, scratch / "tokenizer.model")
    pieces = SentencePieceProcessor(model_file=str(scratch / "tokenizer.model"))
    return pieces.piece_to_id(IMAGE_CONTEXT), pieces.get_piece_size()
