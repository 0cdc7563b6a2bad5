# SPDX-License-Identifier: Apache-2.0
"""The image tokens of the vocabulary, and text to ids through Megatron's tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_smar.data.exactness import (
    GuardedPieces,
    HuggingFacePieces,
    Pieces,
    changed,
    difference,
    fast_tokenizer,
    same_text,
)
from megatron_smar.data.rejects import SampleError
from megatron_smar.modalities import Modalities

IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
EOS = "{eos}"  # the tokenizer's end-of-sentence token, whatever its name


@dataclass(frozen=True)
class ImageTokens:
    """Ids of InternVL's image tokens.

    Args:
        start_id: ``<img>``, before an image's placeholders.
        end_id: ``</img>``, behind them.
        placeholder_ids: The placeholders of one vision token, one for each kind of images, in the order of the
            modalities; the first is ``<IMG_CONTEXT>``.
    """

    start_id: int
    end_id: int
    placeholder_ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, modalities: Modalities | None = None) -> ImageTokens:
        """Look the ids up in a Megatron text tokenizer.

        Raises:
            ValueError: A token is missing from the vocabulary.
        """
        tokens = (IMAGE_START, IMAGE_END, *(modalities or Modalities()).placeholders)
        ids = [_token_id(tokenizer, token) for token in tokens]
        missing = [token for token, token_id in zip(tokens, ids, strict=True) if token_id is None]
        if missing:
            more = [token for token in missing if token not in IMAGE_TOKENS]
            raise ValueError(
                f"The tokenizer {getattr(tokenizer, 'path', None)} has no token {' '.join(missing)}: add them with "
                f"`python tools/data/add_tokens.py IN OUT{f' --also {_quoted(more)}' if more else ''}` and give OUT as "
                "--tokenizer-model, or name them to a "
                f"HuggingFaceTokenizer with --tokenizer-special-tokens {_quoted(tokens)}."
            )
        start, end, *placeholders = (int(token_id) for token_id in ids if token_id is not None)
        return cls(start, end, tuple(placeholders))

    @property
    def context_id(self) -> int:
        """``<IMG_CONTEXT>``, the placeholder of one vision token of an ordinary image."""
        return self.placeholder_ids[0]

    def block(self, num_vision_tokens: int, modality: int = 1) -> list[int]:
        """Return the ids of one image of a modality: start, its placeholders, end."""
        return [self.start_id, *[self.placeholder_ids[modality - 1]] * num_vision_tokens, self.end_id]


class TextEncoder:
    """Pieces of one text to ids, such that they join to the ids of the whole text and spell it exactly.

    Args:
        tokenizer: Megatron text tokenizer (``get_tokenizer()``).
        special_tokens: What the conversation template needs as single tokens (`ConversationTemplate.special_tokens`).
        modalities: The run's table of modalities; text and vision by default.

    Raises:
        ValueError: The tokenizer lacks one of these, an image token or an end-of-sentence token, or it changes text.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: Sequence[str] = (), modalities: Modalities | None = None
    ) -> None:
        """Look up the special ids, and try the tokenizer out."""
        self.tokenizer = tokenizer
        self.modalities = modalities or Modalities()
        self.image_tokens = ImageTokens.from_tokenizer(tokenizer, self.modalities)
        self.bos_id = _special_id(tokenizer, "bos")
        eos_id = _special_id(tokenizer, "eos")
        if eos_id is None:
            raise ValueError(
                f"The tokenizer {getattr(tokenizer, 'path', None)} has no end-of-sentence token, which ends every "
                "answer: take a --tokenizer-model that has one (and leave --tokenizer-sentencepiece-legacy out)."
            )
        self.eos_id = eos_id
        pad_id = _special_id(tokenizer, "pad")
        # Padding is masked everywhere, so that any id will do where the tokenizer has none for it.
        self.pad_id = eos_id if pad_id is None else pad_id
        self._specials = {EOS: eos_id, **_template_ids(tokenizer, special_tokens)}
        # What would begin or end a text or a turn, or stand for a picture. Other special tokens may be what a text is
        # about: those of grounding (<ref>, <box>) are.
        images = (self.image_tokens.start_id, self.image_tokens.end_id, *self.image_tokens.placeholder_ids)
        self._never_in_text = {self.bos_id, *self._specials.values(), *images}
        self._pieces = _pieces(tokenizer, self.image_tokens.end_id, self.bos_id)
        if (change := changed(self._pieces, _special_id(tokenizer, "unk"))) is not None:
            raise ValueError(
                f"The tokenizer {getattr(tokenizer, 'path', None)} changes text ({change[0]!r} becomes "
                f"{change[1]!r}), so that the model would not learn what the records say: take another "
                "--tokenizer-model; one of SentencePiece is trained with --normalization_rule_name=identity "
                "--remove_extra_whitespaces=false --byte_fallback."
            )

    @property
    def puts_space(self) -> bool:
        """Whether the tokenizer puts a space in front of a text."""
        return self._pieces.puts_space

    def special_id(self, token: str) -> int:
        """Return the id of `EOS`, or of one of `special_tokens`."""
        return self._specials[token]

    def encode(self, text: str, *, begins_text: bool = False) -> list[int]:
        """Encode one piece of text.

        Args:
            text: The piece.
            begins_text: It is the first one, so that what the tokenizer puts in front of a text belongs to it.

        Returns:
            Its ids, without beginning- and end-of-sentence tokens. They spell the text exactly, but for what Unicode
            calls equivalent (a letter with its accent, in one character or two).

        Raises:
            SampleError: The text spells out a special token, or has something that the tokenizer has no tokens for.
        """
        ids = self._pieces.encode(text, begins_text)
        if not self._never_in_text.isdisjoint(ids):
            first = next(token_id for token_id in ids if token_id in self._never_in_text)
            name = self.tokenizer._tokenizer.ids_to_tokens([first])[0]
            raise SampleError("special_token_in_text", f"the text spells out {name}, which only the template may write")
        read = self._pieces.decode(ids, begins_text)
        if not same_text(read, text):
            raise SampleError("text_changed", f"the tokenizer has no tokens for {difference(text, read)}")
        return ids


def control_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Return those of some names that are control tokens of a vocabulary, which no text can spell out by accident."""
    fast = fast_tokenizer(tokenizer)
    if fast is not None:
        return [token for token in tokens if (i := fast.get_vocab().get(token)) is not None and _is_special(fast, i)]
    pieces = getattr(tokenizer._tokenizer, "tokenizer", None)
    if not isinstance(pieces, SentencePieceProcessor):
        return []
    return [token for token in tokens if pieces.is_control(pieces.piece_to_id(token))]


def puts_space(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a space in front of a text."""
    return bool(tokenizer._tokenizer.text_to_tokens("a")[0].startswith(("▁", "Ġ")))


def add_tokens(source: str | Path, destination: str | Path, tokens: Sequence[str] = IMAGE_TOKENS) -> None:
    """Write a tokenizer with `tokens` behind its last id; those it has already stay where they are.

    Args:
        source: A SentencePiece model, or the folder of a Hugging Face tokenizer.
        destination: File or folder to write.
        tokens: What to add.

    Raises:
        ValueError: `source` is neither.
    """
    add = _add_to_huggingface if Path(source).is_dir() else _add_to_sentencepiece
    add(Path(source), Path(destination), tokens)


def _add_to_sentencepiece(source: Path, destination: Path, tokens: Sequence[str]) -> None:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(source.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{source} cannot be read as a SentencePiece model ({error}).") from error
    present = {piece.piece for piece in model.pieces}
    for token in tokens:
        if token not in present:
            # A user-defined symbol is always one piece, and nothing merges across it.
            model.pieces.add(piece=token, score=0.0, type=model.SentencePiece.USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    destination.write_bytes(model.SerializeToString())


def _add_to_huggingface(source: Path, destination: Path, tokens: Sequence[str]) -> None:
    tokenizer = load_huggingface(source)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(destination)


def load_huggingface(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder, whose code is not run.

    Raises:
        ValueError: It cannot be loaded, or not without its own code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "it names code of its own, which is never run here" if "custom code" in str(error) else lines[0]
        raise ValueError(f"{folder} cannot be read as the folder of a Hugging Face tokenizer ({reason}).") from error


def _pieces(tokenizer: Any, end_id: int, bos_id: int | None) -> Pieces:
    fast = fast_tokenizer(tokenizer)
    if fast is None:
        return GuardedPieces(tokenizer, end_id, IMAGE_END, bos_id)
    return HuggingFacePieces(fast, end_id, IMAGE_END)


def _is_special(fast: Any, token_id: int) -> bool:
    added = fast.added_tokens_decoder.get(token_id)
    return added is not None and bool(added.special)


def _template_ids(tokenizer: Any, tokens: Sequence[str]) -> dict[str, int]:
    control = control_tokens(tokenizer, tokens)
    ids = {
        token: tokenizer._tokenizer.token_to_id(token) if token in control else _token_id(tokenizer, token)
        for token in tokens
    }
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise ValueError(
            f"The tokenizer {getattr(tokenizer, 'path', None)} has no token {' '.join(missing)}, which the "
            "conversation template writes: choose another --conversation-template, or add the tokens with `python "
            f"tools/data/add_tokens.py IN OUT --also {_quoted(missing)}` and give OUT as --tokenizer-model."
        )
    return {token: token_id for token, token_id in ids.items() if token_id is not None}


def _token_id(tokenizer: Any, token: str) -> int | None:
    """Return the id of a token that is one piece in any text, None if there is none."""
    ids = {i for i in tokenizer.tokenize(token) if tokenizer.detokenize([i], skip_special_tokens=False) == token}
    return ids.pop() if len(ids) == 1 else None


def _special_id(tokenizer: Any, name: str) -> int | None:
    """Return a tokenizer's special id; libraries say that there is none by -1, None or an error."""
    try:
        token_id = getattr(tokenizer, name)
    except (AttributeError, NotImplementedError):
        return None
    return None if token_id is None or token_id < 0 else int(token_id)


def _quoted(tokens: Sequence[str]) -> str:
    return " ".join(f"'{token}'" for token in tokens)
