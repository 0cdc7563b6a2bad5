# SPDX-License-Identifier: Apache-2.0
"""From a record to tokens: conversation templates, checks, and which tokens are to be learned."""

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
    """A run of text that is either learned or not.

    Args:
        text: The text; ``<image>`` tags in it stand for images.
        is_target: Whether the loss counts on its tokens.
        special: A special token that follows and is learned as the text is: `EOS`, or one of the template's.
    """

    text: str
    is_target: bool
    special: str | None = None


@dataclass(frozen=True)
class ConversationTemplate:
    """How a conversation is written as one text.

    In all of its patterns ``{eos}`` stands for the tokenizer's end-of-sentence token, and ``<|name|>`` and ``{[NAME]}``
    are special tokens of the vocabulary (the latter without the braces); records cannot spell out any of them.

    Args:
        user: A user's turn up to where the answer begins, with ``{text}``, and ``{system}`` where system text goes.
        assistant: An answer, with ``{text}`` and the token that ends it: what is learned.
        between: What joins a user's turn to the answer before it.
        system: How system text is written, with ``{system_text}``.
        default_system: System text of a conversation that has no system turn; an empty system turn switches it off.
        default_system_with_images: The same where the user shows an image; None is `default_system`.
        keeps_user_text: False leaves nothing of the user's turn but its ``<image>`` tags.
        system_in_last: System text goes into the last of the user's turns, not the first.
        system_apart: System text is a turn of its own, so that it runs into no other text.
        front: What stands before each run of text in a user's turn; images end one.
        image_first: An image behind the only text of a turn goes before it.
        strips_answers: Spaces at the end of an answer are left out.
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
        """The vocabulary must have these as single tokens, in the order of their names."""
        patterns = self.user + self.assistant + self.between + self.system
        return sorted({_token_name(token) for token in _SPECIAL.findall(patterns)} - {EOS})

    @property
    def end_of_turn(self) -> str:
        """The special token that ends an answer: `EOS` or one of `special_tokens`."""
        return _token_name(_SPECIAL.findall(self.assistant)[-1])

    def render(self, turns: Sequence[tuple[str, str]]) -> list[Segment]:
        """Write turns ``(role, text)``, as `read_turns` gives them, as segments."""
        segments: list[Segment] = []
        system = turns[0][1] if turns[0][0] == "system" else self._default_system(turns)
        asked = [number for number, (role, _) in enumerate(turns) if role == "user"]
        with_system = asked[-1 if self.system_in_last else 0] if asked and system.strip() else None
        for number, (role, text) in enumerate(turns):
            if role == "user":
                system_pattern = self.system if number == with_system else ""
                text = self._user_text(text, behind_text=bool(system_pattern) and not self.system_apart)
                pattern = (self.between if segments else "") + self.user.replace("{system}", system_pattern)
                segments += _write(pattern, is_target=False, text=text, system_text=system)
            elif role == "assistant":
                # The space in front of an answer separates; with nothing before it there is nothing to separate.
                pattern = self.assistant if segments else self.assistant.removeprefix(" ")
                text = text.rstrip(" ") if self.strips_answers else text
                segments += _write(pattern, is_target=True, text=text)
        return segments

    def _user_text(self, text: str, behind_text: bool) -> str:
        """A user's text as the template shows it; without images it runs on from system text before it."""
        if not self.keeps_user_text:
            return IMAGE_TAG * text.count(IMAGE_TAG)
        runs = text.split(IMAGE_TAG)
        if self.image_first and len(runs) == 2 and not runs[1]:
            runs.reverse()
        front = "" if behind_text and len(runs) == 1 else self.front
        return IMAGE_TAG.join(run and front + run for run in runs)

    def _default_system(self, turns: Sequence[tuple[str, str]]) -> str:
        if self.default_system_with_images is not None and any(IMAGE_TAG in text for _, text in turns):
            return self.default_system_with_images
        return self.default_system


def _write(pattern: str, is_target: bool, **texts: str) -> Iterator[Segment]:
    """Fill a pattern, cut at its special tokens before the texts go in, so that no text can pass for one."""
    parts = _SPECIAL.split(pattern)  # text, token, text, token, ..., text
    for part, special in zip_longest(parts[::2], parts[1::2]):
        segment = Segment(part.format_map(texts), is_target, special and _token_name(special))
        if segment.text or special:
            yield segment


def _token_name(token: str) -> str:
    """A special token by its name, as a pattern of a template has it."""
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
    # Stage 1 (visual alignment): the picture, then its caption.
    "plain": ConversationTemplate(user="{text}", assistant=" {text}{eos}", keeps_user_text=False),
    # Mistral and Mixtral instruct, v1: <s>[INST] user [/INST] answer</s> [INST] user [/INST] answer</s>; where the
    # vocabulary has these as control tokens `template_for` gives later versions.
    "mistral": ConversationTemplate(
        user="[INST] {system}{text} [/INST]", assistant=" {text}{eos}", between=" ", system="{system_text}\n\n"
    ),
    # VITA (vita/conversation.py, mixtral_two): an end of sentence behind every turn, of which the answers' are learned.
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
    # ChatML, as Qwen's and others'. The newline behind the last answer, which nothing learns or sees, is left out.
    "chatml": ConversationTemplate(
        user="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{text}<|im_end|>",
        between="\n",
        system="<|im_start|>system\n{system_text}<|im_end|>\n",
    ),
}


def get_template(name: str) -> ConversationTemplate:
    """Return a template by name.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ValueError(f"--conversation-template {name} is unknown: choose one of {', '.join(TEMPLATES)}.") from None


def template_for(name: str, tokenizer: Any) -> ConversationTemplate:
    """Return a template by name, as a tokenizer's vocabulary asks for it.

    `mistral` is Mistral's own by the versions of mistral-common: v1 as text, from v2 on with control tokens.

    Args:
        name: As for `get_template`.
        tokenizer: Megatron text tokenizer.

    Raises:
        ValueError: There is none of that name.
    """
    template = get_template(name)
    if name != "mistral" or not control_tokens(tokenizer, ["[INST]"]):
        return template
    # Each run of text is encoded as a text of its own: SentencePiece puts a space in front, Tekken does not.
    front = " " if puts_space(tokenizer) else ""
    apart = bool(control_tokens(tokenizer, ["[SYSTEM_PROMPT]"]))  # from v7 on
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
    """Check a record's ``conversations`` and return its turns as ``(role, text)``.

    Roles are ``system`` (at most one, first), then ``user`` and ``assistant`` by turns.

    Args:
        conversations: The turns.
        system: The record's own system text, which becomes the first turn.

    Raises:
        SampleError: ``empty_conversation``, ``bad_record``, ``role_order``, ``image_in_answer``, `check_text`'s or
            `check_keys`'s.
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
    """Refuse text that no text is, or that would pass for a picture.

    Args:
        text: Of a record.
        where: How a message names it.

    Raises:
        SampleError: ``null_character``, ``invalid_unicode`` or ``image_token_in_text``.
    """
    if "\0" in text:
        raise SampleError("null_character", f"{where} has a null character at {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, and Python reads it
        raise SampleError("invalid_unicode", f"{where} has a lone surrogate at {error.start}") from error
    for token in IMAGE_TOKENS:
        if token in text:
            raise SampleError("image_token_in_text", f"{where} contains {token}, which stands for an image")


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or spoken != expected:
        wanted = "user and assistant by turns, the last an answer"
        raise SampleError("role_order", f"the turns are from {', '.join(roles)}; wanted is {wanted}")


def has_turns(record: dict[str, Any]) -> bool:
    """Return whether a record is read as a conversation, and not as plain text: an empty column is none."""
    return "text" not in record or not is_empty(record.get("conversations"))


def record_segments(record: Any, template: ConversationTemplate, num_images: int) -> list[Segment]:
    """Turn one record into segments.

    Args:
        record: ``{"conversations": [...]}``, with or without a ``system`` text, or ``{"text": ...}`` (plain text:
            all of it is learned); where there are both, the conversation counts.
        template: How conversations are written.
        num_images: Number of images that came with the record.

    Raises:
        SampleError: The record is malformed, or its ``<image>`` tags are not as many as its images.
    """
    if not isinstance(record, dict) or not ("conversations" in record or "text" in record):
        raise SampleError("bad_record", "the record is no JSON object with `conversations` or `text`")
    check_keys(record)
    system = None if is_empty(record.get("system")) else record["system"]
    if system is not None and not isinstance(system, str):
        raise SampleError("bad_record", "`system` is not a text")
    if has_turns(record):
        segments = template.render(read_turns(record["conversations"], system))
    else:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise SampleError("empty_conversation", "`text` is not a text with something in it")
        if system is not None:
            raise SampleError("bad_record", "`system` stands beside `text`, which is learned as it is")
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
    """Turn segments into token ids and say which of them are to be learned.

    Args:
        segments: From `record_segments`.
        encoder: Text to ids.
        image_lengths: Number of vision tokens of each image, in the order of the ``<image>`` tags.
        kinds: The modality of each image (`fields.image_modalities`); None for ordinary ones, vision.

    Returns:
        Ids [n] and, for each, whether it is a target. A beginning-of-sentence token, if the tokenizer has one, and
        the tokens of images are never targets.

    Raises:
        SampleError: The text spells out a special token, or an image is of a kind that the run does not have.
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
