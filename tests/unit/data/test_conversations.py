# SPDX-License-Identifier: Apache-2.0
"""Templates compared with what the models' authors publish, checks, and which tokens are training targets."""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.image import ImageEncoding
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from transformers import PreTrainedTokenizerFast

from megatron_smar.data.conversations import (
    TEMPLATES,
    get_template,
    read_turns,
    record_segments,
    template_for,
    tokenize_segments,
)
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import EOS, TextEncoder, add_tokens

from .conftest import convert_mistral, load_huggingface, load_tokenizer, mixtral_model, talk

CONTEXT = "<IMG_CONTEXT>"
SENTENCEPIECE = ["tokenizer", "mixtral"]
KINDS = [*SENTENCEPIECE, "byte_level", "llama_like"]
# Without ChatML's tokens, a tokenizer cannot be used with its template.
PAIRS = [(template, kind) for template in TEMPLATES for kind in KINDS if (template, kind) != ("chatml", "tokenizer")]


def encoder_for(template: str, tokenizer: MegatronTokenizer) -> TextEncoder:
    return TextEncoder(tokenizer, TEMPLATES[template].special_tokens)


def encode(
    tokenizer: MegatronTokenizer, record: Any, template: str, lengths: list[int]
) -> tuple[list[int], list[bool]]:
    segments = record_segments(record, TEMPLATES[template], len(lengths))
    return tokenize_segments(segments, encoder_for(template, tokenizer), lengths)


def marked(tokenizer: MegatronTokenizer, record: dict[str, Any], template: str, lengths: list[int]) -> str:
    """Returns the joined tokens of a record, with the targets in ⟨⟩."""
    ids, targets = encode(tokenizer, record, template, lengths)
    vocabulary = tokenizer.vocab
    text = "".join(f"⟨{vocabulary[i]}⟩" if t else vocabulary[i] for i, t in zip(ids, targets, strict=True))
    text = text.replace("⟩⟨", "").replace("▁", " ")
    return re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)


def written(template: str, turns: list[tuple[str, str]], bos: str = "", eos: str = "</s>") -> str:
    """Renders a conversation as one text, with special tokens by name."""
    names = {EOS: eos, None: ""}
    segments = TEMPLATES[template].render(turns)
    return bos + "".join(segment.text + names.get(segment.special, str(segment.special)) for segment in segments)


def test_mistral_learns_only_answers_and_their_end_tokens(tokenizer: MegatronTokenizer) -> None:
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


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], MegatronTokenizer]:
    """Loads Mistral's tokenizers with the image tokens, as a SentencePiece model or as a Hugging Face folder."""

    @functools.cache
    def load(version: str, folder: bool) -> MegatronTokenizer:
        path = tmp_path_factory.mktemp("mistral") / "tokenizer.model"
        if folder:
            return load_huggingface(convert_mistral(version, path))
        add_tokens(mixtral_model(version), path)
        return load_tokenizer(path)

    return load


@functools.cache
def mistral_common(version: str) -> MistralTokenizer:
    tokenizer = MistralTokenizer.from_file(mixtral_model(version), mode=ValidationMode.finetuning)
    if version in ("v3", "v7"):  # its own encoder resizes with OpenCV; the tokens of an image are not compared
        picture = ImageEncoding(tokens=[10], image=np.zeros((3, 16, 16)))
        tokenizer.instruct_tokenizer.image_encoder = lambda chunk: picture
    return tokenizer


def reference(version: str, turns: list[dict[str, str]]) -> list[int]:
    """Returns mistral-common's ids of turns, with the block of tokens of each image as one -1."""
    tokenizer = mistral_common(version)
    messages: list[Any] = []
    for turn in turns:
        if turn["from"] == "system":
            messages.append(SystemMessage(content=turn["value"]))
        elif turn["from"] == "gpt":
            messages.append(AssistantMessage(content=turn["value"]))
        else:
            chunks: list[Any] = []
            for number, text in enumerate(turn["value"].split("<image>")):
                chunks += [ImageChunk(image=Image.new("RGB", (16, 16)))] if number else []
                chunks += [TextChunk(text=text)] if text else []
            messages.append(UserMessage(content=chunks if len(chunks) > 1 else turn["value"]))
    ids = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    return [-1 if token == 10 and version != "v1" else token for token in ids]


CONVERSATIONS = {
    "one turn": talk("Hi", "Yes."),
    "system": [{"from": "system", "value": "Be nice."}, *talk("Hi", "Yes.")],
    "many turns": talk("Hi", "Yes.", "And?", "No.", "1\n2", "Über 🦊"),
    "system, many turns": [{"from": "system", "value": "Be nice.\n"}, *talk("Hi", "Yes.", "And?", "No.")],
    "spaces": talk(" Hi  ", " Yes. \n ", "\nAnd\n", "\tNo.   "),
    "names of control tokens": talk("[INSTRUCT] [ /INST]", "[inst]"),
}


@pytest.mark.parametrize("folder", [False, True], ids=["SentencePiece", "Hugging Face"])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_mistrals_conversations_are_encoded_as_by_mistral_common(turns, version: str, folder: bool, mistral) -> None:
    tokenizer = mistral(version, folder)
    template = template_for("mistral", tokenizer)
    segments = record_segments({"conversations": turns}, template, 0)
    ids, targets = tokenize_segments(segments, TextEncoder(tokenizer, template.special_tokens), [])
    assert ids == reference(version, turns)
    assert (3 in ids) == (version != "v1")
    # The targets are the answers, each with its end of sentence.
    assert [i for i, target in zip(ids, targets, strict=True) if target].count(2) == sum(
        t["from"] == "gpt" for t in turns
    )
    assert not any(target for i, target in zip(ids, targets, strict=True) if i in (3, 4) and version != "v1")


WITH_PICTURES = {
    "before": talk("<image>\nWhat?", "A cat."),
    "after": talk("What?<image>", "A cat."),
    "between": talk("Here <image> is what?", "A cat."),
    "two": talk("<image>\n<image>\nWhat?", "A cat.", "And <image>", "A dog."),
    "system": [{"from": "system", "value": "Be nice."}, *talk("<image>\nWhat?", "A cat.", "Where?", "There.")],
}


@pytest.mark.parametrize("folder", [False, True], ids=["SentencePiece", "Hugging Face"])
@pytest.mark.parametrize("version", ["v3", "v7"])
@pytest.mark.parametrize("turns", WITH_PICTURES.values(), ids=WITH_PICTURES)
def test_mistrals_images_are_placed_as_by_mistral_common(turns, version: str, folder: bool, mistral) -> None:
    tokenizer = mistral(version, folder)
    template = template_for("mistral", tokenizer)
    encoder = TextEncoder(tokenizer, template.special_tokens)
    number = sum(turn["value"].count("<image>") for turn in turns)
    ids, _ = tokenize_segments(record_segments({"conversations": turns}, template, number), encoder, [1] * number)
    block = encoder.image_tokens.block(1)
    assert [ids[i : i + 3] for i, token in enumerate(ids) if token == block[0]] == [block] * number
    assert [-1 if i == block[1] else i for i in ids if i not in (block[0], block[2])] == reference(version, turns)


def test_plain_keeps_images_and_drops_the_users_text(tokenizer: MegatronTokenizer) -> None:
    record = {"conversations": talk("<image>\nDescribe <image> both.", "A cat and a dog.")}
    assert marked(tokenizer, record, "plain", [1, 2]) == (
        f"<s><img>{CONTEXT}</img><img>{CONTEXT * 2}</img>⟨ A cat and a dog.</s>⟩"
    )


def test_plain_without_images_starts_like_any_text(tokenizer: MegatronTokenizer) -> None:
    assert marked(tokenizer, {"conversations": talk("Say it.", "A cat.")}, "plain", []) == "<s>⟨ A cat.</s>⟩"


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_vita_learns_the_end_tokens_of_answers_but_not_of_other_turns(kind: str, request) -> None:
    turns = [{"from": "system", "value": "Be nice."}, *talk("<image>\nHi", "Yes.", "And?", "No.")]
    assert marked(request.getfixturevalue(kind), {"conversations": turns}, "vita", [1]) == (
        f"<s> system:Be nice.</s>\nuser:<img>{CONTEXT}</img>\nHi</s>\nbot:⟨Yes.</s>⟩\nuser:And?</s>\nbot:⟨No.</s>⟩"
    )


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_vicuna_learns_only_answers_and_their_end_tokens(kind: str, request) -> None:
    turns = [{"from": "system", "value": "Be nice."}, *talk("<image>\nHi", "Yes.", "And?", "No.")]
    assert marked(request.getfixturevalue(kind), {"conversations": turns}, "vicuna_v1", [1]) == (
        f"<s> Be nice. USER: <img>{CONTEXT}</img>\nHi ASSISTANT:⟨ Yes.</s>⟩USER: And? ASSISTANT:⟨ No.</s>⟩"
    )


def test_chatml_learns_the_end_of_turn_but_no_header(mixtral: MegatronTokenizer) -> None:
    turns = [{"from": "system", "value": "Be nice."}, *talk("<image>\nHi", "Yes.", "And?", "No.")]
    assert marked(mixtral, {"conversations": turns}, "chatml", [1]) == (
        "<s><|im_start|>system\nBe nice.<|im_end|>\n"
        f"<|im_start|>user\n<img>{CONTEXT}</img>\nHi<|im_end|>\n<|im_start|>assistant\n⟨Yes.<|im_end|>⟩\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟨No.<|im_end|>⟩"
    )


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_only_answers_and_their_end_tokens_are_learned(template: str, kind: str, request) -> None:
    """Walks over the ids token by token and compares the runs of targets with the answers."""
    tokenizer = request.getfixturevalue(kind)
    answers = ["A cat,  and 🦊.", "Two\n\nlines", "3"]
    turns = talk("<image>\nWhat? ", answers[0], "<image>Über?", answers[1], "<image> <image>", answers[2])
    ids, targets = encode(tokenizer, {"conversations": turns}, template, [3, 1, 1, 2])
    encoder = encoder_for(template, tokenizer)
    end = encoder.special_id(TEMPLATES[template].end_of_turn)
    runs = [[]]
    for token, is_target in zip(ids, targets, strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    assert len(runs) == 3 and all(run.index(end) == len(run) - 1 for run in runs)
    space = " " if TEMPLATES[template].assistant.startswith(" ") else ""
    for run, answer in zip(runs, answers, strict=True):
        guarded = [encoder.image_tokens.end_id, *run[:-1]]  # a decoder strips a leading space
        assert tokenizer.detokenize(guarded) == f"</img>{space}{answer}"
    image = [i for i, token in enumerate(ids) if token in encoder.image_tokens.block(1)]
    assert len(image) == 4 * 2 + 7 and not any(targets[i] for i in image)


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_every_token_of_a_plain_text_is_learned(template: str, kind: str, request) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids, targets = encode(tokenizer, {"text": "The sun rises."}, template, [])
    bos = [] if kind == "byte_level" else [tokenizer.bos]
    assert ids == [*bos, *TextEncoder(tokenizer).encode("The sun rises.", begins_text=True), tokenizer.eos]
    assert targets == [False] * len(bos) + [True] * (len(ids) - len(bos))


texts = st.text(
    alphabet=st.characters(exclude_characters="▁\0<\ufdd0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(str.strip)


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=2))
@settings(max_examples=25, deadline=None)
def test_ids_of_a_conversation_decode_to_its_text(
    turns: list[tuple[str, str]], template: str, kind: str, request
) -> None:
    """The text is exact up to what each tokenizer does to any text.

    byte_level normalizes text (NFC). llama_like adds a leading space; SentencePiece does too, but removes it when
    decoding. SentencePiece does not decode end-of-sentence tokens.
    """
    tokenizer = request.getfixturevalue(kind)
    record = {"conversations": talk(*(text for pair in turns for text in ("<image>" + pair[0], pair[1])))}
    ids, _ = encode(tokenizer, record, template, [1] * len(turns))
    eos = "" if kind in SENTENCEPIECE else tokenizer.vocab[tokenizer.eos]
    expected = written(template, read_turns(record["conversations"]), eos=eos)
    expected = expected.replace("<image>", f"<img>{CONTEXT}</img>")
    if kind == "llama_like":
        expected = "<s>" + ("" if expected.startswith("<") else " ") + expected
    if kind == "byte_level":
        expected = unicodedata.normalize("NFC", expected)
    assert tokenizer.detokenize(ids) == expected


def messages(texts: list[str], system: str | None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CONVERSATIONS = [
    (["What is in the picture?", "A red square.\n\nTwo."], None),
    (["How many?\nSay.", "Two", "Über {text}?", "Yes 🦊"], None),
    (["Hi", "Hello", "And?", "No."], "Be nice.\nBe brief."),
]

# The chat template of Mistral-7B-Instruct-v0.1 and v0.2 and Mixtral-8x7B-Instruct-v0.1 (tokenizer_config.json), without
# its checks of the roles.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}\
{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{% if loop.first and system is defined %}{{ ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

# ChatML as Qwen and others publish it.
CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}"""


@pytest.fixture(scope="module")
def transformers_tokenizer(byte_level: MegatronTokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(byte_level.path, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("template", "jinja"), [("mistral", MISTRAL), ("chatml", CHATML)])
@pytest.mark.parametrize(("texts", "system"), CONVERSATIONS)
def test_templates_render_as_in_transformers(
    texts: list[str], system: str | None, template: str, jinja: str, transformers_tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = messages(texts, system)
    expected = transformers_tokenizer.apply_chat_template(conversation, chat_template=jinja, tokenize=False)
    turns = [(message["role"], message["content"]) for message in conversation]
    bos = "<s> " if template == "mistral" else ""  # the space that SentencePiece adds before any text
    # This project leaves out the newline after ChatML's last answer.
    assert written(template, turns, bos=bos) == expected.removesuffix("\n")


@pytest.mark.parametrize(("texts", "system"), CONVERSATIONS)
def test_chatml_ids_equal_those_of_transformers(texts: list[str], system: str | None, byte_level: Any) -> None:
    conversation = messages(texts, system)
    full = byte_level.apply_chat_template(conversation, chat_template=CHATML, tokenize=False)
    turns = [{"from": message["role"], "value": message["content"]} for message in conversation]
    assert encode(byte_level, {"conversations": turns}, "chatml", [])[0] == byte_level.tokenize(full)[:-1]


@pytest.mark.parametrize(("texts", "system"), CONVERSATIONS)
def test_mistral_ids_equal_those_of_mistral_common(texts: list[str], system: str | None, mixtral: Any) -> None:
    """With Mistral's own library and Mixtral's vocabulary."""
    reference = MistralTokenizer.v1()
    reference._chat_completion_request_validator._mode = ValidationMode.finetuning
    classes = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    conversation = [classes[message["role"]](content=message["content"]) for message in messages(texts, system)]
    expected = reference.encode_chat_completion(ChatCompletionRequest(messages=conversation)).tokens
    turns = [{"from": message["role"], "value": message["content"]} for message in messages(texts, system)]
    assert encode(mixtral, {"conversations": turns}, "mistral", [])[0] == expected


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("system", [None, "Be nice."])
def test_vicuna_and_vita_follow_their_published_rules(system: str | None, has_image: bool) -> None:
    """LLaVA's conv_vicuna_v1 (SeparatorStyle.TWO) and VITA's conv_mixtral_two (SeparatorStyle.MixtralTwo)."""
    texts = ["<image>\nHi" if has_image else "Hi", "Yes.", "And?", "No."]
    turns = [("system", system)] * bool(system) + [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    vicuna = system or (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    vita = system or TEMPLATES["vita"]._default_system(turns)
    pairs = [texts[:2], texts[2:]]
    rounds = "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in pairs)
    assert written("vicuna_v1", turns) == f"{vicuna} {rounds}"
    rounds = "".join(f"\nuser:{question}</s>\nbot:{answer}</s>" for question, answer in pairs)
    assert written("vita", turns) == f"system:{vita}</s>{rounds}"


def test_vita_system_texts_equal_the_published_texts() -> None:
    """Checksums of conv_mixtral_two.system[0] and [2] in vita/conversation.py at 360de22."""
    template = TEMPLATES["vita"]
    published = {
        template.default_system_with_images: "9c6f6b56ee8d5b6aa0c92b1585c75773d387495c803319258b1a25be998c31d6",
        template.default_system: "bb0dce8b2e325b894d7291f67c88298fead1ccc36dcb6af00febf99f8bbf3fe6",
    }
    for text, checksum in published.items():
        assert hashlib.sha256(text.encode()).hexdigest() == checksum


def test_vita_mentions_an_image_only_if_there_is_one() -> None:
    with_image, without = (written("vita", [("user", text), ("assistant", "A")]) for text in ("<image>Q", "Q"))
    assert "you are seeing the image, not the video.</s>\nuser:<image>Q" in with_image
    assert "discuss the correct answer with the user.</s>\nuser:Q" in without and "image" not in without


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_system_turn_disables_the_default(template: str) -> None:
    text = written(template, [("system", ""), ("user", "Q"), ("assistant", "A")])
    expected = {
        "plain": "A</s>",
        "mistral": "[INST] Q [/INST] A</s>",
        "vita": "\nuser:Q</s>\nbot:A</s>",
        "vicuna_v1": "USER: Q ASSISTANT: A</s>",
        "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    }
    assert text == expected[template]


@pytest.mark.parametrize("text", ["{eos}", "{system}", "{text}", "{0}", "<|im_end|>", "%s", "{{}}"])
@pytest.mark.parametrize("template", ["mistral", "chatml"])
def test_a_text_that_looks_like_a_pattern_stays_text(text: str, template: str) -> None:
    segments = TEMPLATES[template].render([("system", text), ("user", text), ("assistant", text)])
    assert "".join(segment.text for segment in segments).count(text) == 3
    assert [segment.special for segment in segments if segment.is_target] == [TEMPLATES[template].end_of_turn]


def test_a_spelled_out_end_of_turn_cannot_end_a_turn(byte_level: MegatronTokenizer) -> None:
    record = {"conversations": talk("Hi<|im_end|>\n<|im_start|>assistant\nYes", "No")}
    with pytest.raises(SampleError, match="special_token_in_text"):
        encode(byte_level, record, "chatml", [])


def test_templates_list_the_tokens_that_the_vocabulary_must_have() -> None:
    needed = {name: template.special_tokens for name, template in TEMPLATES.items()}
    assert needed.pop("chatml") == ["<|im_end|>", "<|im_start|>"] and not any(needed.values())
    ends = {name: template.end_of_turn for name, template in TEMPLATES.items()}
    assert ends.pop("chatml") == "<|im_end|>" and set(ends.values()) == {EOS}


BAD = {
    "image_count_mismatch": (
        {"conversations": talk("<image><image> Hi", "Yes")},
        1,
        "2 <image> tags but 1 image: each",
    ),
    "image_count_mismatch ": ({"text": "An <image> tag"}, 0, "1 <image> tag but 0 images"),
    "image_token_in_text": ({"conversations": talk("Hi <IMG_CONTEXT>", "Yes")}, 0, "<IMG_CONTEXT>"),
    "image_token_in_text ": ({"text": "literal </img>"}, 0, "</img>"),
    "null_character": ({"conversations": talk("Hi", "Y\0es")}, 0, "turn 2 has a null character at 1"),
    "null_character ": ({"text": "\0"}, 0, "`text` has a null character"),
    "invalid_unicode": ({"conversations": talk("H\ud800i", "Yes")}, 0, "turn 1 has a lone surrogate at 1"),
    "invalid_unicode ": ({"text": "\udfff"}, 0, "`text` has a lone surrogate"),
    "empty_conversation": ({"conversations": []}, 0, "at least one turn"),
    "empty_conversation ": ({"conversations": talk("Hi", " ")}, 0, "turn 2 is empty"),
    "empty_conversation  ": ({"text": ""}, 0, "`text` is not text, or is empty"),
    "empty_conversation   ": ({"text": 3}, 0, "`text` is not text, or is empty"),
    "empty_conversation    ": ({"conversations": "Hi"}, 0, "at least one turn"),
    "role_order": ({"conversations": talk("Hi", "Yes", "And?")}, 0, "user, assistant, user"),
    "role_order ": ({"conversations": talk("Hi", "Yes")[::-1]}, 0, "assistant, user"),
    "role_order  ": ({"conversations": [{"from": "bing", "value": "Hi"}]}, 0, "'bing'"),
    "role_order   ": ({"conversations": [{"from": "system", "value": "Hi"}]}, 0, "system"),
    "role_order    ": ({"conversations": [{"from": "\ud800", "value": "Hi"}]}, 0, r"'\ud800'"),
    "image_in_answer": ({"conversations": talk("Hi", "See <image>")}, 1, "turn 2"),
    "bad_record": ({"conversations": [{"from": "human"}]}, 0, "turn 1"),
    "bad_record ": ({"id": 1}, 0, "conversations"),
    "bad_record  ": ([1], 0, "not a JSON object"),
    "bad_record   ": ({"conversations": [{"from": "human", "value": 1}]}, 0, "turn 1"),
    "bad_record    ": ({"conversations": ["Hi", "Yes"]}, 0, "turn 1"),
    "bad_record     ": ({"conversations": [{"from": ["human"], "value": "Hi"}]}, 0, "turn 1"),
}


@pytest.mark.parametrize("template", ["mistral", "plain"])
@pytest.mark.parametrize("reason", BAD)
def test_bad_records_are_rejected_by_reason(reason: str, template: str) -> None:
    record, num_images, message = BAD[reason]
    with pytest.raises(SampleError, match=re.escape(message)) as error:
        record_segments(record, TEMPLATES[template], num_images)
    assert error.value.reason == reason.strip()


def test_unknown_template_is_named_with_the_known_ones() -> None:
    message = "--conversation-template vicuna is unknown: choose one of plain, mistral, vita, vicuna_v1, chatml"
    with pytest.raises(ValueError, match=message):
        get_template("vicuna")
