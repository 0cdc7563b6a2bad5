# SPDX-License-Identifier: Apache-2.0
"""Image tokens and piecewise encoding, with Mixtral's tokenizer and two kinds of Hugging Face tokenizers."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import IMAGE_TOKENS, ImageTokens, TextEncoder, add_tokens
from tools.data.add_tokens import main

from .conftest import (
    CHATML_TOKENS,
    TEXT,
    load_huggingface,
    load_tokenizer,
    mixtral_model,
    train_byte_level,
    train_llama_like,
    train_sentencepiece,
)

KINDS = ["tokenizer", "mixtral", "byte_level", "llama_like"]
LANGUAGES = [
    *TEXT.splitlines(),
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。 いろはにほへと ちりぬるを",
    "أبجد هوز حطي كلمن   नमस्ते दुनिया  안녕하세요",
    "def f(x):\n\treturn x**2  # <b>&amp;</b>\r\n\n\n🦊👩‍👩‍👧 ﷽ [INST] <s> </s> <unk> <|im_start|",
]
# Any text without null characters, lone surrogates and SentencePiece's character for a space. No "<" either: hypothesis
# finds the names of the special tokens in this project's sources, and those are not text.
texts = st.text(
    alphabet=st.characters(exclude_characters="▁\0<\ufdd0", exclude_categories=["Cs"]), min_size=1, max_size=30
)


def test_image_token_ids_match_the_vocabulary(tokenizer: MegatronTokenizer) -> None:
    tokens = ImageTokens.from_tokenizer(tokenizer)
    assert [tokenizer.vocab[i] for i in (tokens.start_id, tokens.end_id, tokens.context_id)] == list(IMAGE_TOKENS)
    assert tokens.block(2) == [tokens.start_id, tokens.context_id, tokens.context_id, tokens.end_id]


def test_missing_image_tokens_are_reported_with_the_fix(plain_model: Path) -> None:
    with pytest.raises(ValueError, match=r"has no token <img> </img> <IMG_CONTEXT>: .*tools/data/add_tokens"):
        ImageTokens.from_tokenizer(load_tokenizer(plain_model))


def test_a_templates_missing_tokens_are_reported_with_the_fix(tokenizer: MegatronTokenizer) -> None:
    with pytest.raises(ValueError, match=r"no token <\|im_end\|> <\|im_start\|>, .*--conversation-template, .*--also"):
        TextEncoder(tokenizer, sorted(CHATML_TOKENS))


def test_image_tokens_are_added_after_mixtrals_tokens_and_change_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tokenizer(mixtral_model())
    monkeypatch.setattr("sys.argv", ["tokens", str(mixtral_model()), str(tmp_path / "new.model")])
    main()
    after = load_tokenizer(tmp_path / "new.model")
    assert before.vocab_size == 32000 and after.vocab == before.vocab + list(IMAGE_TOKENS)
    assert ImageTokens.from_tokenizer(after) == ImageTokens(32000, 32001, (32002,))
    assert [after.tokenize(line) for line in LANGUAGES] == [before.tokenize(line) for line in LANGUAGES]
    assert (after.bos, after.eos, after.unk) == (before.bos, before.eos, before.unk) == (1, 2, 0)


@pytest.fixture(scope="module")
def published_mixtral() -> MegatronTokenizer:
    return load_tokenizer(mixtral_model())


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_mixtral_with_image_tokens_encodes_any_text_as_before(
    text: str, mixtral: MegatronTokenizer, published_mixtral: MegatronTokenizer
) -> None:
    assert mixtral.tokenize(text) == published_mixtral.tokenize(text)


@pytest.mark.parametrize("train", [train_byte_level, train_llama_like])
def test_image_tokens_are_added_after_a_hugging_face_vocabulary_and_change_none(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train(tmp_path / "in")
    monkeypatch.setattr("sys.argv", ["tokens", str(source), str(tmp_path / "out"), "--also", "<|im_end|>", "<new>"])
    main()
    before, after, given = (
        load_huggingface(source, []),
        load_huggingface(tmp_path / "out", []),
        load_huggingface(source),
    )
    added = [*IMAGE_TOKENS, *(token for token in ("<|im_end|>", "<new>") if token not in before.vocab)]
    assert after.vocab == before.vocab + added
    assert given.vocab == before.vocab + list(IMAGE_TOKENS)  # with --tokenizer-special-tokens instead
    for line in LANGUAGES:
        assert before.tokenize(line) == after.tokenize(line) == given.tokenize(line)


def test_adding_image_tokens_twice_changes_nothing(
    tokenizer: MegatronTokenizer, byte_level: MegatronTokenizer, tmp_path: Path
) -> None:
    add_tokens(tokenizer.path, tmp_path / "again.model")
    assert load_tokenizer(tmp_path / "again.model").vocab == tokenizer.vocab
    for source, destination in ((byte_level.path, "once"), (tmp_path / "once", "twice")):
        add_tokens(source, tmp_path / destination)
    assert load_huggingface(tmp_path / "twice", []).vocab == byte_level.vocab


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.model", "as a SentencePiece model"), ("folder", "as the folder of a Hugging Face tokenizer")],
)
def test_a_source_that_is_not_a_tokenizer_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{name} cannot be read {message}"):
        add_tokens(tmp_path / name, tmp_path / "new")


def test_tokenizer_without_end_of_sentence_is_refused(plain_model: Path) -> None:
    wrapper = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(plain_model),
        metadata_path={"library": "sentencepiece"},
        legacy=True,
        special_tokens=list(IMAGE_TOKENS),
    )
    with pytest.raises(ValueError, match=r"no end-of-sentence token.*--tokenizer-sentencepiece-legacy"):
        TextEncoder(wrapper)


# What a tokenizer does to text -> the options of SentencePiece's trainer that cause it.
CHANGES_TEXT = {
    "SentencePiece's defaults": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "newlines to spaces": {"normalization_rule_name": "nmt_nfkc"},
    "compatible characters": {"normalization_rule_name": "nfkc"},
    "small letters": {"normalization_rule_name": "nfkc_cf"},
    "runs of spaces": {"remove_extra_whitespaces": True},
    "newlines unknown": {"byte_fallback": False, "vocab_size": 120},
    "a space after text": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("options", CHANGES_TEXT.values(), ids=CHANGES_TEXT)
def test_a_sentencepiece_model_that_changes_text_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "x.model", user_defined_symbols=list(IMAGE_TOKENS), **options)
    with pytest.raises(ValueError, match=r"x.model changes text \(.* becomes .*--tokenizer-model") as refusal:
        TextEncoder(load_tokenizer(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options", [{"model_type": "unigram", "vocab_size": 320}, {"add_dummy_prefix": False}])
def test_a_sentencepiece_model_that_keeps_text_is_accepted(options: dict[str, Any], tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "x.model", user_defined_symbols=list(IMAGE_TOKENS), **options)
    tokenizer = load_tokenizer(path)
    encoder = TextEncoder(tokenizer)
    end_id = encoder.image_tokens.end_id
    for text in ("\nWhat", "\n\n a\t b  ", " x", "é🦊"):
        assert tokenizer.detokenize([end_id, *encoder.encode(text), end_id]) == f"</img>{text}</img>"


def letters(**parts: Any) -> Tokenizer:
    """Returns a byte-level tokenizer with some of its parts replaced."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Prepend("x")},
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.StripAccents()},
        {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
        {"normalizer": normalizers.Replace("\n", " ")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])},
        {"decoder": decoders.WordPiece()},
    ],
    ids=lambda parts: next(iter(parts.values())).__class__.__name__,
)
def test_a_hugging_face_tokenizer_that_changes_text_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=letters(**parts), eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"changes text \(.* becomes .*--tokenizer-model"):
        TextEncoder(load_huggingface(tmp_path))


def test_a_character_without_a_token_rejects_the_sample_and_not_the_run(tmp_path: Path) -> None:
    path = train_sentencepiece(
        tmp_path / "x.model",
        user_defined_symbols=[*IMAGE_TOKENS, "\n", "\t", "\r"],
        byte_fallback=False,
        vocab_size=120,
    )
    encoder = TextEncoder(load_tokenizer(path))
    with pytest.raises(SampleError, match=r"text_changed: the tokenizer has no tokens for '🦊 is', at 2"):
        encoder.encode("a 🦊 is")


RUNS = ["\n\n", "\n\n\n", "\nWhat", "\t\t"]


@pytest.fixture(scope="module", params=["Prepend", "always", "first", "never"])
def with_newline_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """Tokenizers like Llama's, with pieces for runs of newlines and for a newline with a word."""
    return load_huggingface(train_llama_like(tmp_path_factory.mktemp("runs"), RUNS, request.param))


@given(texts=st.lists(st.text(alphabet="ab What\n\t\r .🦊é", min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_newline_or_space_is_lost_with_pieces_for_runs_of_whitespace(
    texts: list[str], with_newline_runs: MegatronTokenizer
) -> None:
    encoder = TextEncoder(with_newline_runs)
    end_id = encoder.image_tokens.end_id
    # With a token before the text, because decoders strip the space at its beginning.
    ids = [end_id]
    for text in texts:
        ids += [*encoder.encode(text), end_id]
    assert with_newline_runs.detokenize(ids) == "</img>" + "</img>".join(texts) + "</img>"
    assert encoder.encode("\nWhat") == [with_newline_runs.vocab.index("\nWhat")]
    space = [with_newline_runs.vocab.index("▁")] if encoder.puts_space else []
    assert encoder.encode("\n\n", begins_text=True) == [*space, with_newline_runs.vocab.index("\n\n")]


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_encoded_text_decodes_exactly(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    end_id = encoder.image_tokens.end_id
    for piece in (text, f"\n{text}", f" {text}  ", f"\t{text}\r\n"):
        expected = normalizers.NFC().normalize_str(piece) if kind == "byte_level" else piece
        assert tokenizer.detokenize([end_id, *encoder.encode(piece), end_id]) == f"</img>{expected}</img>"


def test_sentencepieces_space_character_in_text_is_refused(mixtral: MegatronTokenizer) -> None:
    with pytest.raises(SampleError, match=r"text_changed: the tokenizer has no tokens for '▁▂▃', at 5"):
        TextEncoder(mixtral).encode("bars ▁▂▃")


def test_padding_is_end_of_sentence_without_a_padding_token(mixtral: MegatronTokenizer) -> None:
    encoder = TextEncoder(mixtral)
    assert encoder.pad_id == encoder.eos_id == 2


pieces = st.lists(st.text(alphabet="ab c\n.[/]é🦊", min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["tokenizer", "mixtral", "byte_level"])
@given(texts=pieces)
@settings(max_examples=150, deadline=None)
def test_pieces_between_images_join_to_the_ids_of_the_full_text(
    texts: list[str], kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    ids: list[int] = []
    for position, text in enumerate(texts):
        ids += encoder.encode(text, begins_text=position == 0)
        ids += encoder.image_tokens.block(2)
    image = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert ids == tokenizer.tokenize(image.join(texts) + image)


@given(texts=pieces)
@settings(max_examples=150, deadline=None)
def test_no_space_is_added_by_a_tokenizer_that_adds_one_after_every_special_token(
    texts: list[str], llama_like: MegatronTokenizer
) -> None:
    encoder = TextEncoder(llama_like)
    ids: list[int] = []
    for position, text in enumerate(texts):
        ids += [*encoder.encode(text, begins_text=position == 0), encoder.image_tokens.end_id]
    assert llama_like.detokenize(ids) == "</img>".join(texts) + "</img>"
    assert encoder.encode(" the cat") == encoder.encode("the cat", begins_text=True)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_decoding_returns_the_text(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    expected = normalizers.NFC().normalize_str(text) if kind == "byte_level" else text
    assert tokenizer.detokenize(encoder.encode(text, begins_text=True)) == expected


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("tokenizer", "</img>"),
        ("byte_level", "<|endoftext|>"),
        ("byte_level", "<|im_end|>"),
        ("llama_like", "</s>"),
        ("llama_like", "<s>"),
        ("mixtral", "<|im_end|>"),
    ],
)
def test_text_with_a_begin_or_end_token_is_rejected_with_the_tokens_name(
    kind: str, token: str, request: pytest.FixtureRequest
) -> None:
    special = [] if kind == "tokenizer" else CHATML_TOKENS
    for begins_text in (False, True):
        with pytest.raises(SampleError, match=re.escape(f"special_token_in_text: the text spells out {token},")):
            TextEncoder(request.getfixturevalue(kind), special).encode(f"an {token} in text", begins_text=begins_text)


@pytest.mark.parametrize("train", [train_byte_level, train_llama_like])
def test_a_tokenizers_grounding_tokens_are_kept_as_single_ids(train: Any, tmp_path: Path) -> None:
    own = ["<ref>", "</ref>", "<box>", "</box>", "<|box_start|>", "<|box_end|>"]
    tokenizer = load_huggingface(train(tmp_path), [*IMAGE_TOKENS, *own])
    text = "the <ref>cat</ref><box>[[1, 2, 3, 4]]</box> and <|box_start|>(1,2),(3,4)<|box_end|>"
    for begins_text in (False, True):
        ids = TextEncoder(tokenizer).encode(text, begins_text=begins_text)
        assert [token for token in (tokenizer.vocab[i] for i in ids) if token in own] == own


def test_special_tokens_that_the_template_does_not_use_are_allowed_in_text(byte_level: MegatronTokenizer) -> None:
    ids = TextEncoder(byte_level).encode("an <|im_end|> in text")
    assert byte_level.vocab.index("<|im_end|>") in ids


def test_names_of_sentencepieces_control_tokens_are_text(mixtral: MegatronTokenizer) -> None:
    assert mixtral.detokenize(TextEncoder(mixtral).encode("<s> </s> <unk>", begins_text=True)) == "<s> </s> <unk>"
