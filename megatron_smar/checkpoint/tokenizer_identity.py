# SPDX-License-Identifier: Apache-2.0
"""Checks that the tokenizer is the checkpoint's, and decides the size of the model's vocabulary."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size
from sentencepiece import SentencePieceProcessor

from megatron_smar.data.tokens import load_huggingface

Fingerprint = tuple[int, str]  # number of pieces, and a hash of all pieces in the order of their ids


def fingerprint(pieces: Sequence[Any]) -> Fingerprint:
    """Returns the fingerprint of a vocabulary, given its pieces in the order of their ids."""
    digest = hashlib.sha256("\x00".join(map(str, pieces)).encode("utf-8", "surrogatepass"))
    return len(pieces), digest.hexdigest()


def fingerprints_of_folder(folder: Path) -> list[Fingerprint]:
    """Returns the fingerprints of a folder's tokenizers: Hugging Face's and a SentencePiece model; empty without any.

    Raises:
        ValueError: The folder's tokenizer cannot be loaded, or not without running its code.
    """
    found = []
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        tokenizer = load_huggingface(folder)
        found.append(fingerprint(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))))
    if (folder / "tokenizer.model").is_file():
        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        found.append(fingerprint(model.id_to_piece(list(range(model.get_piece_size())))))
    return list(dict.fromkeys(found))


def settle_vocabulary(args: Namespace, tokenizer: Any, saved: Any | None) -> None:
    """Decides how many tokens the model's vocabulary has, and pads it for the parallel layout.

    Sets `true_vocab_size` (the larger of the checkpoint's and the tokenizer's size), `padded_vocab_size`, and
    `tokenizer_fingerprints`, all of which are saved with the next checkpoint.

    Args:
        args: The run's arguments.
        tokenizer: Megatron's tokenizer.
        saved: Arguments of the run that saved the checkpoint in --load; None without a checkpoint.

    Raises:
        ValueError: The tokenizer is not the checkpoint's.
    """
    pieces = None if args.tokenizer_type.startswith("Null") else _pieces(tokenizer)
    size = len(pieces) if pieces is not None else int(tokenizer.vocab_size)
    args.true_vocab_size = size
    args.tokenizer_fingerprints = [fingerprint(pieces)] if pieces is not None else []
    if saved is not None:
        stored = _stored_size(saved, size)
        if "tokenizer" not in args.allow_model_change:
            _check_tokenizer(args, pieces, size, stored, saved)
        args.true_vocab_size = max(stored, size)
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.true_vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, False
    )


def _pieces(tokenizer: Any) -> list[Any] | None:
    """Returns all pieces in the order of their ids; None for a tokenizer that cannot list them."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # the wrapper has no public access to it
    try:
        return list(inner.ids_to_tokens(list(range(tokenizer.vocab_size))))
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _stored_size(saved: Any, size: int) -> int:
    """Returns the number of tokens of the checkpoint's vocabulary.

    Checkpoints of older releases store the padded size only. If `size` tokens, padded, give that size, `size` is
    returned, else the padded size.
    """
    true: int | None = getattr(saved, "true_vocab_size", None)
    padded: int | None = getattr(saved, "padded_vocab_size", None)
    if true is not None or padded is None:
        return true if true is not None else size
    multiple = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    imported = padded % multiple != 0 or padded == getattr(saved, "vocab_size", None)  # imports are not padded
    return size if not imported and calculate_padded_vocab_size(size, multiple, 1, False) == padded else padded


def _check_tokenizer(args: Namespace, pieces: list[Any] | None, size: int, stored: int, saved: Any) -> None:
    known: list[Fingerprint] = [tuple(each) for each in getattr(saved, "tokenizer_fingerprints", None) or []]
    given = f"--tokenizer-model {args.tokenizer_model}" if args.tokenizer_model else f"--vocab-size {size}"
    switch = "or --allow-model-change tokenizer if it is meant"
    if size > stored:
        raise ValueError(
            f"{given} has {size} tokens, and the vocabulary of the checkpoint in --load {args.load} has {stored}; give "
            f"the tokenizer that it was trained with, {switch}: the others' rows start at random."
        )
    if pieces is None:
        return
    if known and not any(fingerprint(pieces[:number]) == (number, mark) for number, mark in known):
        sizes = " or ".join(str(number) for number, _ in known)
        raise ValueError(
            f"{given}, with {size} tokens, is not the tokenizer of the checkpoint in --load {args.load}, which has "
            f"{sizes} tokens (its vocabulary has {stored} rows); give that one, {switch}."
        )
    if not known and size < stored:
        raise ValueError(
            f"{given} has {size} tokens, and the vocabulary of the checkpoint in --load {args.load} has {stored}, and "
            f"it does not say what its tokenizer was; give the tokenizer that it was trained with, {switch}."
        )
