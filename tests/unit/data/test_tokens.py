# SPDX-License-Identifier: Apache-2.0
"""Image tokens and piecewise encoding, with Mixtral's own tokenizer and the two kinds of Hugging Face's."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
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
# What text there is: anything but a null character, half a surrogate pair and SentencePiece's sign for a space. No "<":
# hypothesis finds the names of the special tokens in our sources, and those are not text.
texts = st.text(alphabet=st.characters(exclude_characters="▁\0<", exclude_categories=["Cs"]), min_size=1, max_size=30)


def test_ids_of_image_tokens_are_the_vocabularys(tokenizer: MegatronTokenizer) -> None:
    tokens = ImageTokens.from_tokenizer(tokenizer)
    assert [tokenizer.vocab[i] for i in (tokens.start_id, tokens.end_id, tokens.context_id)] == list(IMAGE_TOKENS)
    assert tokens.block(2) == [tokens.start_id, tokens.context_id, tokens.context_id, tokens.end_id]


def test_missing_image_tokens_are_named_with_the_mend(plain_model: Path) -> None:
    with pytest.raises(ValueError, match=r"has no token <img> </img> <IMG_CONTEXT>: .*tools/data/add_tokens"):
        ImageTokens.from_tokenizer(load_tokenizer(plain_model))


def test_a_templates_missing_tokens_are_named_with_the_mend(tokenizer: MegatronTokenizer) -> None:
    with pytest.raises(ValueError, match=r"no token <\|im_end\|> <\|im_start\|>, .*--conversation-template, .*--also"):
        TextEncoder(tokenizer, sorted(CHATML_TOKENS))


def test_image_tokens_follow_mixtrals_own_and_change_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tokenizer(mixtral_model())
    monkeypatch.setattr("sys.argv", ["tokens", str(mixtral_model()), str(tmp_path / "new.model")])
    main()
    after = load_tokenizer(tmp_path / "new.model")
    assert before.vocab_size == 32000 and after.vocab == before.vocab + list(IMAGE_TOKENS)
    assert ImageTokens.from_tokenizer(after) == ImageTokens(32000, 32001, 32002)
    assert [after.tokenize(line) for line in LANGUAGES] == [before.tokenize(line) for line in LANGUAGES]
    assert (after.bos, after.eos, after.unk) == (before.bos, before.eos, before.unk) == (1, 2, 0)


@pytest.fixture(scope="module")
def published_mixtral() -> MegatronTokenizer:
    return load_tokenizer(mixtral_model())


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_mixtral_with_image_tokens_reads_any_text_as_before(
    text: str, mixtral: MegatronTokenizer, published_mixtral: MegatronTokenizer
) -> None:
    assert mixtral.tokenize(text) == published_mixtral.tokenize(text)


@pytest.mark.parametrize("train", [train_byte_level, train_llama_like])
def test_image_tokens_follow_a_hugging_face_vocabulary_and_change_none_of_it(
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
    assert given.vocab == before.vocab + list(IMAGE_TOKENS)  # by --tokenizer-special-tokens instead
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
def test_what_is_no_tokenizer_is_named(name: str, message: str, tmp_path: Path) -> None:
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


def test_a_tokenizer_that_changes_text_behind_special_tokens_is_refused(tmp_path: Path) -> None:
    letters = Tokenizer(models.BPE({"a": 0, "x": 1, "xa": 2, "</s>": 3}, [("x", "a")]))
    letters.normalizer = normalizers.Prepend("x")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"changes text that stands behind a special token.*--tokenizer-model"):
        TextEncoder(load_huggingface(tmp_path))


def test_padding_is_end_of_sentence_where_there_is_no_padding_token(mixtral: MegatronTokenizer) -> None:
    encoder = TextEncoder(mixtral)
    assert encoder.pad_id == encoder.eos_id == 2


pieces = st.lists(st.text(alphabet="ab c\n.[/]é🦊▁", min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["tokenizer", "mixtral", "byte_level"])
@given(texts=pieces)
@settings(max_examples=150, deadline=None)
def test_pieces_between_images_join_to_the_ids_of_the_whole_text(
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


@given(texts=st.lists(st.text(alphabet="ab c\n.[/]é🦊", min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_space_slips_in_where_the_tokenizer_puts_one_behind_every_special_token(
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
def test_decoding_gives_the_text_back(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    expected = normalizers.NFC().normalize_str(text) if kind == "byte_level" else text
    assert tokenizer.detokenize(encoder.encode(text, begins_text=True)) == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("tokenizer", "an </img> in text"),
        ("byte_level", "an <|endoftext|> in text"),
        ("byte_level", "an <|im_end|> in text"),
        ("llama_like", "an </s> in text"),
        ("mixtral", "an <|im_end|> in text"),
    ],
)
def test_text_that_spells_a_special_token_is_rejected(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    special = [] if kind in ("tokenizer", "byte_level") else CHATML_TOKENS
    with pytest.raises(SampleError, match="special_token_in_text"):
        TextEncoder(request.getfixturevalue(kind), special).encode(text)


def test_names_of_sentencepieces_control_tokens_are_text(mixtral: MegatronTokenizer) -> None:
    assert mixtral.detokenize(TextEncoder(mixtral).encode("<s> </s> <unk>", begins_text=True)) == "<s> </s> <unk>"
