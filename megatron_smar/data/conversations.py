# SPDX-License-Identifier: Apache-2.0
"""From records to tokens: conversation templates, checks, and which tokens are training targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from megatron_smar.data.fields import TURN_KEYS, check_keys, counted, image_modalities, is_empty
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import EOS, IMAGE_TOKENS, TextEncoder, control_tokens, puts_space
from megatron_smar.modalities import VISION

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPECIAL = re.compile(r"(\{eos\}|<\|\w+\|>|\{\[/?\w+\]\})")


@dataclass(frozen=True)
class Segment:
    """A run of text that is a training target, or is not.

    Attributes:
        text: The text; `<image>` tags in it stand for images.
        is_target: Whether its tokens count in the loss.
        special: A special token after the text, which is a target if the text is: `EOS`, or one of the template's
            special tokens.
    """

    text: str
    is_target: bool
    special: str | None = None


@dataclass(frozen=True)
class ConversationTemplate:
    """How a conversation is written as one text.

    In all patterns, `{eos}` stands for the tokenizer's end-of-sentence token, and `<|name|>` and `{[NAME]}` are special
    tokens of the vocabulary (the latter without the braces). The text of a record cannot produce any of them.

    Attributes:
        user: Pattern of a user turn, up to the start of the answer, with `{text}`, and `{system}` where the system text
            goes.
        assistant: Pattern of an answer, with `{text}` and the token that ends it. This is the training target.
        between: Text between an answer and the next user turn.
        system: Pattern of the system text, with `{system_text}`.
        default_system: System text of a conversation without a system turn; an empty system turn disables it.
        default_system_with_images: The same for conversations with images; None uses `default_system`.
        keeps_user_text: If False, only the `<image>` tags of a user turn are kept.
        system_in_last: Whether the system text goes into the last user turn instead of the first.
        system_apart: Whether the system text is a separate turn, so that it does not join other text.
        front: Prefix of each run of text in a user turn; images separate the runs.
        image_first: Whether an image that follows the only text of a turn is moved before it.
        strips_answers: Whether spaces at the end of an answer are removed.
    """

    user: str
    assistant: str
    between: str = ""
    system: str = ""
    default_system: str = ""
    default_system_with_images: str | None = None
    keeps_user_text: bool = True
    system_in_last: bool = False
    system_apart: bool = False
    front: str = ""
    image_first: bool = False
    strips_answers: bool = False

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens that the vocabulary must have as single tokens, sorted by name."""
        patterns = self.user + self.assistant + self.between + self.system
        return sorted({_token_name(token) for token in _SPECIAL.findall(patterns)} - {EOS})

    @property
    def end_of_turn(self) -> str:
        """The special token that ends an answer: `EOS` or one of `special_tokens`."""
        return _token_name(_SPECIAL.findall(self.assistant)[-1])

    def render(self, turns: Sequence[tuple[str, str]]) -> list[Segment]:
        """Renders turns `(role, text)`, as returned by `read_turns`, as segments."""
        segments: list[Segment] = []
        system = turns[0][1] if turns[0][0] == "system" else self._default_system(turns)
        asked = [number for number, (role, _) in enumerate(turns) if role == "user"]
        with_system = asked[-1 if self.system_in_last else 0] if asked and system.strip() else None
        for number, (role, text) in enumerate(turns):
            if role == "user":
                system_pattern = self.system if number == with_system else ""
                text = self._user_text(text, after_text=bool(system_pattern) and not self.system_apart)
                pattern = (self.between if segments else "") + self.user.replace("{system}", system_pattern)
                segments += _write(pattern, is_target=False, text=text, system_text=system)
            elif role == "assistant":
                # The space before an answer is a separator, which an answer without a question does not need.
                pattern = self.assistant if segments else self.assistant.removeprefix(" ")
                text = text.rstrip(" ") if self.strips_answers else text
                segments += _write(pattern, is_target=True, text=text)
        return segments

    def _user_text(self, text: str, after_text: bool) -> str:
        """Returns a user's text in the template's form; without images it continues the system text before it."""
        if not self.keeps_user_text:
            return IMAGE_TAG * text.count(IMAGE_TAG)
        runs = text.split(IMAGE_TAG)
        if self.image_first and len(runs) == 2 and not runs[1]:
            runs.reverse()
        front = "" if after_text and len(runs) == 1 else self.front
        return IMAGE_TAG.join(run and front + run for run in runs)

    def _default_system(self, turns: Sequence[tuple[str, str]]) -> str:
        if self.default_system_with_images is not None and any(IMAGE_TAG in text for _, text in turns):
            return self.default_system_with_images
        return self.default_system


def _write(pattern: str, is_target: bool, **texts: str) -> Iterator[Segment]:
    """Fills a pattern, split at its special tokens before the texts are inserted: no text can act as such a token."""
    parts = _SPECIAL.split(pattern)  # text, token, text, token, ..., text
    for part, special in zip_longest(parts[::2], parts[1::2]):
        segment = Segment(part.format_map(texts), is_target, special and _token_name(special))
        if segment.text or special:
            yield segment


def _token_name(token: str) -> str:
    """Returns the name of a special token that is written as in a template's pattern."""
    return token[1:-1] if token.startswith("{[") else token


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VITA_SYSTEM = (
    "You are an AI robot and your name is VITA. \n"
    "- You are a multimodal large language model developed by the open source community. "
    "Your aim is to be helpful, honest and harmless. \n"
    "- You support the ability to communicate fluently and answer user questions in multiple languages of the user's "
    "choice. \n"
    "- If the user corrects the wrong answer you generated, you will apologize and discuss the correct answer with the "
    "user."
)
_VITA_SYSTEM_WITH_IMAGES = (
    f"{_VITA_SYSTEM} \n"
    "- You must answer the question strictly according to the content of the image given by the user, and it is "
    "strictly forbidden to answer the question without the content of the image. Please note that you are seeing the "
    "image, not the video."
)

TEMPLATES: dict[str, ConversationTemplate] = {
    # Stage 1 (visual alignment): the image, then its caption.
    "plain": ConversationTemplate(user="{text}", assistant=" {text}{eos}", keeps_user_text=False),
    # Mistral and Mixtral instruct, v1: <s>[INST] user [/INST] answer</s> [INST] user [/INST] answer</s>. If the
    # vocabulary has [INST] as a control token, `template_for` returns a later version.
    "mistral": ConversationTemplate(
        user="[INST] {system}{text} [/INST]", assistant=" {text}{eos}", between=" ", system="{system_text}\n\n"
    ),
    # VITA (vita/conversation.py, mixtral_two): every turn ends with an end of sentence; only the answers' are targets.
    "vita": ConversationTemplate(
        user="{system}\nuser:{text}{eos}\nbot:",
        assistant="{text}{eos}",
        system="system:{system_text}{eos}",
        default_system=_VITA_SYSTEM,
        default_system_with_images=_VITA_SYSTEM_WITH_IMAGES,
    ),
    # Vicuna v1.1 and LLaVA-1.5 (llava/conversation.py, vicuna_v1).
    "vicuna_v1": ConversationTemplate(
        user="{system}USER: {text} ASSISTANT:",
        assistant=" {text}{eos}",
        system="{system_text} ",
        default_system=_VICUNA_SYSTEM,
    ),
    # ChatML, as used by Qwen and others, without the newline after the last answer: it is not a target, and no target
    # follows it.
    "chatml": ConversationTemplate(
        user="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{text}<|im_end|>",
        between="\n",
        system="<|im_start|>system\n{system_text}<|im_end|>\n",
    ),
}


def get_template(name: str) -> ConversationTemplate:
    """Returns a template by name.

    Raises:
        ValueError: There is no template of that name.
    """
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ValueError(f"--conversation-template {name} is unknown: choose one of {', '.join(TEMPLATES)}.") from None


def template_for(name: str, tokenizer: Any) -> ConversationTemplate:
    """Returns a template by name, in the version that fits a tokenizer's vocabulary.

    `mistral` follows the versions of mistral-common: v1 as text, v2 and later with control tokens.

    Args:
        name: Name of the template, as for `get_template`.
        tokenizer: Megatron text tokenizer.

    Raises:
        ValueError: There is no template of that name.
    """
    template = get_template(name)
    if name != "mistral" or not control_tokens(tokenizer, ["[INST]"]):
        return template
    # Each run of text is encoded separately: SentencePiece adds a leading space, Tekken does not.
    front = " " if puts_space(tokenizer) else ""
    apart = bool(control_tokens(tokenizer, ["[SYSTEM_PROMPT]"]))  # v7 and later
    return ConversationTemplate(
        user="{system}{[INST]}{text}{[/INST]}" if apart else "{[INST]}{system}{text}{[/INST]}",
        assistant=front + "{text}{eos}",
        system=f"{{[SYSTEM_PROMPT]}}{front}{{system_text}}{{[/SYSTEM_PROMPT]}}"
        if apart
        else front + "{system_text}\n\n",
        system_in_last=not apart,
        system_apart=apart,
        front=front,
        image_first=True,
        strips_answers=True,
    )


def read_turns(conversations: Any, system: str | None = None) -> list[tuple[str, str]]:
    """Checks a record's `conversations` and returns the turns as `(role, text)`.

    The roles are `system` (optional, only first), then `user` and `assistant` alternating.

    Args:
        conversations: The turns.
        system: Text of the record's `system` key, which becomes the first turn.

    Raises:
        SampleError: `empty_conversation`, `bad_record`, `role_order`, `image_in_answer`, or a reason of `check_text` or
            `check_keys`.
    """
    if not isinstance(conversations, list) or not conversations:
        raise SampleError("empty_conversation", "`conversations` is not a list with at least one turn")
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(conversations, 1):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise SampleError("bad_record", f"turn {number} has no text in `from` and `value`")
        if speaker not in ROLES:
            raise SampleError("role_order", f"turn {number} is from {speaker!r}, which is none of {', '.join(ROLES)}")
        if len(turn) > len(TURN_KEYS):
            check_keys(turn, TURN_KEYS, f"conversations[{number}].")
        check_text(text, f"turn {number}")
        turns.append((ROLES[speaker], text))
    _check_order([role for role, _ in turns])
    for number, (role, text) in enumerate(turns, 1):
        if role == "assistant" and not text.strip():
            raise SampleError("empty_conversation", f"the answer in turn {number} is empty")
        if role != "user" and IMAGE_TAG in text:
            raise SampleError("image_in_answer", f"turn {number} has an {IMAGE_TAG} tag, but is not the user's")
    return turns if system is None else _with_system(system, turns)


def _with_system(system: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    check_text(system, "`system`")
    if IMAGE_TAG in system:
        raise SampleError("image_in_answer", f"`system` has an {IMAGE_TAG} tag, but is not the user's")
    if turns[0][0] != "system":
        return [("system", system), *turns]
    if turns[0][1] != system:
        raise SampleError("bad_record", "`system` and the first turn, from system, say different things: leave one out")
    return turns


def check_text(text: str, where: str) -> None:
    """Refuses text that is not valid text, or that would be read as an image.

    Args:
        text: A text of a record.
        where: Name of the text in error messages.

    Raises:
        SampleError: `null_character`, `invalid_unicode` or `image_token_in_text`.
    """
    if "\0" in text:
        raise SampleError("null_character", f"{where} has a null character at {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair, and Python reads it
        raise SampleError("invalid_unicode", f"{where} has a lone surrogate at {error.start}") from error
    for token in IMAGE_TOKENS:
        if token in text:
            raise SampleError("image_token_in_text", f"{where} contains {token}, which stands for an image")


def _check_order(roles: list[str]) -> None:
    without_system = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * ((len(without_system) + 1) // 2)
    if not without_system or without_system != expected:
        wanted = "user and assistant alternating, ending with an answer"
        raise SampleError("role_order", f"the turns are from {', '.join(roles)}; expected is {wanted}")


def has_turns(record: dict[str, Any]) -> bool:
    """Returns whether a record is read as a conversation, not as plain text; an empty column does not count."""
    return "text" not in record or not is_empty(record.get("conversations"))


def record_segments(record: Any, template: ConversationTemplate, num_images: int) -> list[Segment]:
    """Converts a record to segments.

    Args:
        record: `{"conversations": [...]}`, with or without a `system` text, or `{"text": ...}` (plain text, all of it a
            target). If it has both, the conversation is used.
        template: The conversation template.
        num_images: Number of images that belong to the record.

    Raises:
        SampleError: The record is malformed, or the number of `<image>` tags differs from the number of images.
    """
    if not isinstance(record, dict) or not ("conversations" in record or "text" in record):
        raise SampleError("bad_record", "the record is not a JSON object with `conversations` or `text`")
    check_keys(record)
    system = None if is_empty(record.get("system")) else record["system"]
    if system is not None and not isinstance(system, str):
        raise SampleError("bad_record", "`system` is not a text")
    if has_turns(record):
        segments = template.render(read_turns(record["conversations"], system))
    else:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise SampleError("empty_conversation", "`text` is not text, or is empty")
        if system is not None:
            raise SampleError("bad_record", "`system` is given beside `text`, which is learned as it is")
        check_text(text, "`text`")
        segments = [Segment(text, is_target=True, special=EOS)]
    image_modalities(record, num_images)
    num_tags = sum(segment.text.count(IMAGE_TAG) for segment in segments)
    if num_tags != num_images:
        tags, images = counted(num_tags, f"{IMAGE_TAG} tag"), counted(num_images, "image")
        raise SampleError("image_count_mismatch", f"{tags} but {images}: each image has one tag, in a user's turn")
    return segments


def tokenize_segments(
    segments: Iterable[Segment], encoder: TextEncoder, image_lengths: Sequence[int], kinds: Sequence[str] | None = None
) -> tuple[list[int], list[bool]]:
    """Converts segments to token ids and marks which of them are training targets.

    Args:
        segments: The segments, from `record_segments`.
        encoder: Encodes text to token ids.
        image_lengths: Number of vision tokens of each image, in the order of the `<image>` tags.
        kinds: The modality of each image (`fields.image_modalities`); None where all are vision.

    Returns:
        Token ids [n] and, for each id, whether it is a target. The beginning-of-sentence token, if the tokenizer has
        one, and the tokens of images are never targets.

    Raises:
        SampleError: The text contains a special token, or an image is of a kind that the run does not have.
    """
    ids = [] if encoder.bos_id is None else [encoder.bos_id]
    num_special = len(ids)
    targets = [False] * num_special
    images = zip(image_lengths, kinds or [VISION] * len(image_lengths), strict=True)
    for segment in segments:
        for position, text in enumerate(segment.text.split(IMAGE_TAG)):
            if position > 0:
                length, kind = next(images)
                block = encoder.image_tokens.block(length, _modality(kind, encoder))
                ids += block
                targets += [False] * len(block)
            if text:
                piece = encoder.encode(text, begins_text=len(ids) == num_special)
                ids += piece
                targets += [segment.is_target] * len(piece)
        if segment.special is not None:
            ids.append(encoder.special_id(segment.special))
            targets.append(segment.is_target)
    return ids, targets


def _modality(kind: str, encoder: TextEncoder) -> int:
    """Return the modality's id of a kind of images."""
    names = encoder.modalities.names
    if kind not in encoder.modalities.images:
        raise SampleError(
            "unknown_modality",
            f"`image_modality` is {kind!r}, and --image-modalities has {' '.join(encoder.modalities.images)}",
        )
    return names.index(kind)
