# SPDX-License-Identifier: Apache-2.0
"""A checkpoint must be trained with its own tokenizer, even if sizes agree; its vocabulary keeps its size."""

from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

from megatron_smar.checkpoint.tokenizer_identity import fingerprint, fingerprints_of_folder, settle_vocabulary
from megatron_smar.data.tokens import add_tokens
from tests.launch import ROOT


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Trains tokenizers of 400 pieces, of 400 others, of 420, and the first with the image tokens appended."""
    folder = tmp_path_factory.mktemp("tokenizers")
    license = [line.strip() for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()]
    page = [line.strip() for line in (ROOT / "docs/routing.md").read_text().splitlines() if line.strip()]
    for name, text, size in (("own", license, 400), ("other", page, 400), ("larger", page, 420)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=str(folder / name), vocab_size=size, model_type="bpe",
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip
    add_tokens(folder / "own.model", folder / "grown.model")
    return {name: folder / f"{name}.model" for name in ("own", "other", "larger", "grown")}


def settle(path: Path | None, saved: Namespace | None, **changes: object) -> Namespace:
    given = dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path), load="checkpoints/start")
    given |= dict(make_vocab_size_divisible_by=64, tensor_model_parallel_size=1, allow_model_change=[])
    args = Namespace(**given | changes)
    settle_vocabulary(args, SentencePieceTokenizer(str(path)), saved)
    return args


def test_without_a_checkpoint_the_vocabulary_has_the_tokenizers_size(models):
    args = settle(models["own"], None)
    assert (args.true_vocab_size, args.padded_vocab_size) == (400, 448)
    assert args.tokenizer_fingerprints[0][0] == 400


def test_the_vocabulary_keeps_the_checkpoints_size_under_any_padding(models):
    saved = settle(models["own"], None)
    saved.true_vocab_size = 433  # rows that the tokenizer does not use, as Qwen's models have them
    args = settle(models["own"], saved, tensor_model_parallel_size=4)
    assert (args.true_vocab_size, args.padded_vocab_size) == (433, 512)


REFUSED = {
    "others of the same number": ("own", "other", ["400 tokens", "is not the tokenizer of the checkpoint"]),
    "more": ("own", "larger", ["420 tokens", "has 400;"]),
    "fewer": ("larger", "own", ["400 tokens", "420 tokens", "420 rows"]),
    "fewer of the same": ("grown", "own", ["400 tokens", "403 tokens", "403 rows"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(models, case):
    before, now, said = REFUSED[case]
    with pytest.raises(ValueError, match="--allow-model-change tokenizer if it is meant") as refusal:
        settle(models[now], settle(models[before], None))
    for part in [*said, f"--tokenizer-model {models[now]}", "--load checkpoints/start"]:
        assert part in str(refusal.value)
    args = settle(models[now], settle(models[before], None), allow_model_change=["tokenizer"])
    assert args.true_vocab_size == max(*(int(SentencePieceTokenizer(str(models[n])).vocab_size) for n in (before, now)))


def test_tokens_appended_to_the_checkpoints_tokenizer_are_accepted_if_its_vocabulary_has_rows_for_them(models):
    saved = settle(models["own"], None)
    with pytest.raises(ValueError, match="403 tokens"):
        settle(models["grown"], saved)
    saved.true_vocab_size = 410
    assert settle(models["grown"], saved).true_vocab_size == 410


def test_a_checkpoint_without_a_fingerprint_accepts_only_a_tokenizer_of_its_size(models):
    """Such are imports of folders without a tokenizer, and checkpoints of releases that stored no fingerprint."""
    imported = Namespace(true_vocab_size=400)
    assert settle(models["own"], imported).true_vocab_size == 400
    with pytest.raises(ValueError, match="420 tokens"):
        settle(models["larger"], imported)
    with pytest.raises(ValueError, match="does not say what its tokenizer was"):
        settle(models["own"], Namespace(true_vocab_size=420))


def test_a_checkpoint_that_stores_only_its_padded_size_is_compared_by_it(models):
    old = Namespace(padded_vocab_size=448, make_vocab_size_divisible_by=64, tensor_model_parallel_size=1)
    assert settle(models["own"], old).true_vocab_size == 400
    with pytest.raises(ValueError, match="has 512"):
        settle(models["own"], Namespace(**vars(old) | {"padded_vocab_size": 512}))


def test_a_hugging_face_folder_and_its_import_have_the_same_fingerprint(models, tmp_path):
    from transformers import LlamaTokenizer

    LlamaTokenizer(vocab_file=str(models["grown"]), legacy=False).save_pretrained(tmp_path)
    loaded = HuggingFaceTokenizer(str(tmp_path))
    pieces = loaded.ids_to_tokens(list(range(loaded.vocab_size)))
    assert fingerprint(pieces) in fingerprints_of_folder(tmp_path)
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path), load="x", allow_model_change=[],
        make_vocab_size_divisible_by=1, tensor_model_parallel_size=1,
    )  # fmt: skip
    imported = Namespace(true_vocab_size=len(pieces) + 7, tokenizer_fingerprints=fingerprints_of_folder(tmp_path))
    settle_vocabulary(args, loaded, imported)
    assert args.true_vocab_size == len(pieces) + 7


def test_a_folder_without_a_tokenizer_has_no_fingerprint(tmp_path):
    assert fingerprints_of_folder(tmp_path) == []


def test_without_a_tokenizer_only_the_size_is_compared(models):
    saved = settle(models["own"], None)
    settings = dict(tokenizer_type="NullTokenizer", tokenizer_model=None, load="x", allow_model_change=[])
    args = Namespace(**settings, make_vocab_size_divisible_by=64, tensor_model_parallel_size=1)
    settle_vocabulary(args, NullTokenizer(400), saved)
    with pytest.raises(ValueError, match="--vocab-size 500 has 500 tokens"):
        settle_vocabulary(args, NullTokenizer(500), saved)
