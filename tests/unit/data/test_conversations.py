# SPDX-License-Identifier: Apache-2.0
"""Templates, checks, and which tokens are learned."""

import re
from typing import Any

import pytest
from megatron.core.tokenizers import MegatronTokenizer

from megatron_smar.data.conversations import TEMPLATES, get_template, record_segments, tokenize_segments
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import TextEncoder

from .conftest import talk

CONTEXT = "<IMG_CONTEXT>"


def marked(tokenizer: MegatronTokenizer, record: dict[str, Any], template: str, lengths: list[int]) -> str:
    """Tokens of a record, joined, with those to be learned in ⟨⟩."""
    segments = record_segments(record, TEMPLATES[template], len(lengths))
    ids, targets = tokenize_segments(segments, TextEncoder(tokenizer), lengths)
    text = "".join(f"⟨{tokenizer.vocab[i]}⟩" if t else tokenizer.vocab[i] for i, t in zip(ids, targets, strict=True))
    text = text.replace("⟩⟨", "").replace("▁", " ")
    return re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)


def test_mistral_learns_answers_and_their_ends_alone(tokenizer: MegatronTokenizer) -> None:
    record = {"conversations": talk("<image>\nWhat is it? <image>", "A cat.", "Where?", "There.")}
    assert marked(tokenizer, record, "mistral", [2, 1]) == (
        f"<s> [INST] <img>{CONTEXT * 2}</img>\nWhat is it? <img>{CONTEXT}</img> [/INST]⟨ A cat.</s>⟩"
        " [INST] Where? [/INST]⟨ There.</s>⟩"
    )


def test_mistral_puts_system_text_before_the_first_user_text(tokenizer: MegatronTokenizer) -> None:
    record = {"conversations": [{"from": "system", "value": "Be nice."}, *talk("Hi {text}", "Yes.", "And?", "No.")]}
    assert marked(tokenizer, record, "mistral", []) == (
        "<s> [INST] Be nice.\n\nHi {text} [/INST]⟨ Yes.</s>⟩ [INST] And? [/INST]⟨ No.</s>⟩"
    )


def test_plain_keeps_images_and_drops_the_users_text(tokenizer: MegatronTokenizer) -> None:
    record = {"conversations": talk("<image>\nDescribe <image> both.", "A cat and a dog.")}
    assert marked(tokenizer, record, "plain", [1, 2]) == (
        f"<s><img>{CONTEXT}</img><img>{CONTEXT * 2}</img>⟨ A cat and a dog.</s>⟩"
    )


def test_plain_without_images_begins_as_any_text(tokenizer: MegatronTokenizer) -> None:
    assert marked(tokenizer, {"conversations": talk("Say it.", "A cat.")}, "plain", []) == "<s>⟨ A cat.</s>⟩"


@pytest.mark.parametrize("template", TEMPLATES)
def test_all_of_a_plain_text_is_learned(tokenizer: MegatronTokenizer, template: str) -> None:
    assert marked(tokenizer, {"text": "The sun rises."}, template, []) == "<s>⟨ The sun rises.</s>⟩"


def test_tokens_are_those_of_mistrals_own_rule(tokenizer: MegatronTokenizer) -> None:
    """Mistral's reference encodes each user turn with its tags as one text, and each answer as another."""
    turns = ["What is in the picture?", "A red square.\n\nTwo.", "How many?", "Two"]
    ids, _ = tokenize_segments(
        record_segments({"conversations": talk(*turns)}, TEMPLATES["mistral"], 0), TextEncoder(tokenizer), []
    )
    expected = [tokenizer.bos]
    for user, answer in zip(turns[::2], turns[1::2], strict=True):
        expected += tokenizer.tokenize(f"[INST] {user} [/INST]") + tokenizer.tokenize(answer) + [tokenizer.eos]
    assert ids == expected


def test_whole_conversation_decodes_to_its_text(tokenizer: MegatronTokenizer) -> None:
    record = {"conversations": talk("<image>\nWhat? ", "A  cat.", "Über 🦊", "Yes")}
    segments = record_segments(record, TEMPLATES["mistral"], 1)
    ids, _ = tokenize_segments(segments, TextEncoder(tokenizer), [1])
    text = "".join(segment.text for segment in segments).replace("<image>", f"<img>{CONTEXT}</img>")
    assert tokenizer.detokenize(ids) == text


BAD = {
    "image_count_mismatch": ({"conversations": talk("<image><image> Hi", "Yes")}, 1, "2 <image> tags but 1 images"),
    "image_count_mismatch ": ({"text": "An <image> tag"}, 0, "1 <image> tags but 0 images"),
    "image_token_in_text": ({"conversations": talk("Hi <IMG_CONTEXT>", "Yes")}, 0, "<IMG_CONTEXT>"),
    "image_token_in_text ": ({"text": "literal </img>"}, 0, "</img>"),
    "empty_conversation": ({"conversations": []}, 0, "at least one turn"),
    "empty_conversation ": ({"conversations": talk("Hi", " ")}, 0, "turn 2 is empty"),
    "empty_conversation  ": ({"text": ""}, 0, "something in it"),
    "role_order": ({"conversations": talk("Hi", "Yes", "And?")}, 0, "user, assistant, user"),
    "role_order ": ({"conversations": talk("Hi", "Yes")[::-1]}, 0, "assistant, user"),
    "role_order  ": ({"conversations": [{"from": "bing", "value": "Hi"}]}, 0, "'bing'"),
    "role_order   ": ({"conversations": [{"from": "system", "value": "Hi"}]}, 0, "system"),
    "image_in_answer": ({"conversations": talk("Hi", "See <image>")}, 1, "turn 2"),
    "bad_record": ({"conversations": [{"from": "human"}]}, 0, "turn 1"),
    "bad_record ": ({"id": 1}, 0, "conversations"),
    "bad_record  ": ([1], 0, "no JSON object"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_records_are_rejected_by_reason(reason: str) -> None:
    record, num_images, message = BAD[reason]
    with pytest.raises(SampleError, match=re.escape(message)) as error:
        record_segments(record, TEMPLATES["mistral"], num_images)
    assert error.value.reason == reason.strip()


def test_unknown_template_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--conversation-template vicuna is unknown: choose one of plain, mistral"):
        get_template("vicuna")
