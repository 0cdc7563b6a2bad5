# SPDX-License-Identifier: Apache-2.0
"""From a record to tokens: conversation templates, checks, and which tokens are to be learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import IMAGE_TOKENS, TextEncoder

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Segment:
    """A run of text that is either learned or not.

    Args:
        text: The text; ``<image>`` tags in it stand for images.
        is_target: Whether the loss counts on its tokens.
        ends_turn: An end-of-sentence token follows, which is learned as the text is.
    """

    text: str
    is_target: bool
    ends_turn: bool = False


@dataclass(frozen=True)
class ConversationTemplate:
    """How a conversation is written as one text.

    Args:
        user: A user's turn, with ``{text}``.
        between: What joins a user's turn to the answer before it.
        assistant: An answer, with ``{text}``; an end-of-sentence token follows each.
        system: System text, with ``{text}``; it goes in front of the first user's text.
        keeps_user_text: False leaves nothing of the user's turn but its ``<image>`` tags.
    """

    user: str
    between: str
    assistant: str
    system: str = "{text}\n\n"
    keeps_user_text: bool = True

    def render(self, turns: Sequence[tuple[str, str]]) -> list[Segment]:
        """Write turns ``(role, text)``, as `read_turns` gives them, as segments."""
        segments: list[Segment] = []
        system = ""
        for role, text in turns:
            if role == "system":
                system = self.system.format_map({"text": text})
            elif role == "user":
                text = system + text if self.keeps_user_text else IMAGE_TAG * text.count(IMAGE_TAG)
                joint = self.between if segments else ""
                segments.append(Segment(joint + self.user.format_map({"text": text}), is_target=False))
                system = ""
            else:
                text = self.assistant.format_map({"text": text})
                # The space in front of an answer separates; with nothing before it there is nothing to separate.
                if not any(segment.text for segment in segments):
                    text = text.removeprefix(" ")
                segments.append(Segment(text, is_target=True, ends_turn=True))
        return [segment for segment in segments if segment.text or segment.ends_turn]


TEMPLATES: dict[str, ConversationTemplate] = {
    # Stage 1 (visual alignment): the picture, then its caption.
    "plain": ConversationTemplate(user="{text}", between="", assistant=" {text}", keeps_user_text=False),
    # Mistral and Mixtral instruct: <s>[INST] user [/INST] answer</s> [INST] user [/INST] answer</s>
    "mistral": ConversationTemplate(user="[INST] {text} [/INST]", between=" ", assistant=" {text}"),
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


def read_turns(conversations: Any) -> list[tuple[str, str]]:
    """Check a record's ``conversations`` and return its turns as ``(role, text)``.

    Roles are ``system`` (at most one, first), then ``user`` and ``assistant`` by turns.

    Raises:
        SampleError: ``empty_conversation``, ``bad_record``, ``role_order`` or ``image_in_answer``.
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
        turns.append((ROLES[speaker], text))
    _check_order([role for role, _ in turns])
    for number, (role, text) in enumerate(turns, 1):
        if role == "assistant" and not text.strip():
            raise SampleError("empty_conversation", f"the answer in turn {number} is empty")
        if role != "user" and IMAGE_TAG in text:
            raise SampleError("image_in_answer", f"turn {number} has an {IMAGE_TAG} tag, but is not the user's")
    return turns


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or spoken != expected:
        wanted = "user and assistant by turns, the last an answer"
        raise SampleError("role_order", f"the turns are from {', '.join(roles)}; wanted is {wanted}")


def record_segments(record: Any, template: ConversationTemplate, num_images: int) -> list[Segment]:
    """Turn one record into segments.

    Args:
        record: ``{"conversations": [...]}`` or ``{"text": ...}`` (plain text: all of it is learned).
        template: How conversations are written.
        num_images: Number of images that came with the record.

    Raises:
        SampleError: The record is malformed, or its ``<image>`` tags are not as many as its images.
    """
    if not isinstance(record, dict) or not ("conversations" in record or "text" in record):
        raise SampleError("bad_record", "the record is no JSON object with `conversations` or `text`")
    if "conversations" in record:
        segments = template.render(read_turns(record["conversations"]))
    else:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise SampleError("empty_conversation", "`text` is not a text with something in it")
        segments = [Segment(text, is_target=True, ends_turn=True)]
    spelled_out = [token for token in IMAGE_TOKENS for segment in segments if token in segment.text]
    if spelled_out:
        raise SampleError("image_token_in_text", f"the text contains {spelled_out[0]}, which stands for an image")
    num_tags = sum(segment.text.count(IMAGE_TAG) for segment in segments)
    if num_tags != num_images:
        raise SampleError("image_count_mismatch", f"{num_tags} {IMAGE_TAG} tags but {num_images} images")
    return segments


def tokenize_segments(
    segments: Iterable[Segment], encoder: TextEncoder, image_lengths: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Turn segments into token ids and say which of them are to be learned.

    Args:
        segments: From `record_segments`.
        encoder: Text to ids.
        image_lengths: Number of vision tokens of each image, in the order of the ``<image>`` tags.

    Returns:
        Ids [n] and, for each, whether it is a target. A beginning-of-sentence token, if the tokenizer has one, and
        the tokens of images are never targets.

    Raises:
        SampleError: The text spells out a special token.
    """
    ids = [] if encoder.bos_id is None else [encoder.bos_id]
    num_special = len(ids)
    targets = [False] * num_special
    lengths = iter(image_lengths)
    for segment in segments:
        for position, text in enumerate(segment.text.split(IMAGE_TAG)):
            if position > 0:
                block = encoder.image_tokens.block(next(lengths))
                ids += block
                targets += [False] * len(block)
            if text:
                piece = encoder.encode(text, begins_text=len(ids) == num_special)
                ids += piece
                targets += [segment.is_target] * len(piece)
        if segment.ends_turn:
            ids.append(encoder.eos_id)
            targets.append(segment.is_target)
    return ids, targets
