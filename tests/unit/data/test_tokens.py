# SPDX-License-Identifier: Apache-2.0
"""Image tokens and piecewise encoding."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tokens import IMAGE_TOKENS, ImageTokens, TextEncoder, add_image_tokens, main

from .conftest import TEXT, load_tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """A byte-level BPE, as Qwen's, as Megatron loads it for --tokenizer-type HuggingFaceTokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT.splitlines() * 4, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder),
        metadata_path={"library": "huggingface"},
        additional_special_tokens=list(IMAGE_TOKENS),
    )


def test_ids_of_image_tokens_are_the_vocabularys(tokenizer: MegatronTokenizer) -> None:
    tokens = ImageTokens.from_tokenizer(tokenizer)
    assert [tokenizer.vocab[i] for i in (tokens.start_id, tokens.end_id, tokens.context_id)] == list(IMAGE_TOKENS)
    assert tokens.block(2) == [tokens.start_id, tokens.context_id, tokens.context_id, tokens.end_id]


def test_missing_image_tokens_are_named_with_the_mend(plain_model: Path) -> None:
    with pytest.raises(ValueError, match=r"has no token <img> </img> <IMG_CONTEXT>: .*megatron_smar\.data\.tokens"):
        ImageTokens.from_tokenizer(load_tokenizer(plain_model))


def test_added_image_tokens_leave_existing_ids_alone(
    plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tokenizer(plain_model)
    monkeypatch.setattr("sys.argv", ["tokens", str(plain_model), str(tmp_path / "new.model")])
    main()
    after = load_tokenizer(tmp_path / "new.model")
    assert after.vocab == before.vocab + list(IMAGE_TOKENS)
    assert [after.tokenize(line) for line in TEXT.splitlines()] == [before.tokenize(line) for line in TEXT.splitlines()]
    assert ImageTokens.from_tokenizer(after) == ImageTokens(
        before.vocab_size, before.vocab_size + 1, before.vocab_size + 2
    )


def test_adding_image_tokens_twice_changes_nothing(tokenizer: MegatronTokenizer, tmp_path: Path) -> None:
    add_image_tokens(tokenizer.path, tmp_path / "again.model")
    assert load_tokenizer(tmp_path / "again.model").vocab == tokenizer.vocab


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"x\.model cannot be read as a SentencePiece model"):
        add_image_tokens(tmp_path / "x.model", tmp_path / "y.model")


def test_tokenizer_without_end_of_sentence_is_refused(tmp_path: Path, plain_model: Path) -> None:
    wrapper = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(plain_model),
        metadata_path={"library": "sentencepiece"},
        legacy=True,
        special_tokens=list(IMAGE_TOKENS),
    )
    with pytest.raises(ValueError, match=r"no end-of-sentence token.*--tokenizer-sentencepiece-legacy"):
        TextEncoder(wrapper)


def test_padding_is_end_of_sentence_where_there_is_no_padding_token(plain_model: Path, tmp_path: Path) -> None:
    add_image_tokens(plain_model, tmp_path / "new.model")
    encoder = TextEncoder(load_tokenizer(tmp_path / "new.model"))
    assert encoder.pad_id == encoder.eos_id


pieces = st.lists(st.text(alphabet="ab c\n.[/]é🦊▁", min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["tokenizer", "byte_level"])
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


@pytest.mark.parametrize("kind", ["tokenizer", "byte_level"])
@given(
    text=st.text(alphabet=st.characters(exclude_characters="▁\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
)
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_text_back(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    assert tokenizer.detokenize(encoder.encode(text, begins_text=True)) == text


def test_text_that_spells_a_special_token_is_rejected(
    tokenizer: MegatronTokenizer, byte_level: MegatronTokenizer
) -> None:
    for which, text in ((tokenizer, "an </img> in text"), (byte_level, "an <eos> in text")):
        with pytest.raises(SampleError, match="special_token_in_text"):
            TextEncoder(which).encode(text)
