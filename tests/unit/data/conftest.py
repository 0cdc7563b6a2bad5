# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers, images and shards for the data tests."""

import gc
import importlib.resources
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from megatron.core.tokenizers import MegatronTokenizer
from megatron.energon.wrappers import gc_dataset
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter

import megatron_smar.data.preparation
from megatron_smar.data import DataConfig, ImageConfig
from megatron_smar.data.tokens import IMAGE_TOKENS, add_tokens

TEXT = """The quick brown fox jumps over the lazy dog, and the dog sleeps on.
What is in the picture? A red square is in the picture. How many squares are there? There are two.
In the morning the sun rises over the hills; in the evening it sets behind the sea.
A cat sat on the mat, looked at the moon and said nothing at all. Describe the image in one sentence, please.
Which colour is it? It is blue, not green. Where is the bird? The bird is in the tree near the old house.
[INST] Say yes or no. [/INST] Yes. Numbers: 0 1 2 3 4 5 6 7 8 9."""


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """Trains a SentencePiece model with Mixtral's settings on this file's text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=(stream := io.BytesIO()),
        **(
            {
                "model_type": "bpe",
                "vocab_size": 420,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "minloglevel": 2,
            }
            | options
        ),
    )
    path.write_bytes(stream.getvalue())
    return path


CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def train_byte_level(folder: Path) -> Path:
    """Trains a byte-level BPE with Qwen's settings on this file's text; writes a folder that transformers reads."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *CHATML_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT.splitlines() * 4 + ["a\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def train_llama_like(folder: Path, more: Sequence[str] = (), prefix: str = "Prepend") -> Path:
    """Trains a BPE with byte fallback and a leading space, like Llama's and Mixtral's `tokenizer.json`.

    Args:
        folder: Folder to write.
        more: Further pieces, each merged from its characters one by one.
        prefix: What adds the leading space: the normalizer "Prepend", or Metaspace with this prepend scheme.
    """
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = before
    bpe.train_from_iterator(TEXT.splitlines() * 4, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in model["merges"]]
    first = []  # pairs that are merged before all others
    for piece in more:
        for end in range(1, len(piece) + 1):
            for part in (piece[:end], piece[end - 1]):
                vocabulary.setdefault(part, len(vocabulary))
            first += [(piece[: end - 1], piece[end - 1])] if end > 1 else []
    merges = [*dict.fromkeys(first), *merges]
    llama = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "Prepend":
        llama.normalizer = before
    else:
        llama.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    llama.decoder = decoders.Sequence(after)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=llama, **names).save_pretrained(folder)
    return folder


def load_huggingface(folder: Path, tokens: Sequence[str] = IMAGE_TOKENS) -> MegatronTokenizer:
    """Loads a folder as Megatron's build_tokenizer does for --tokenizer-type HuggingFaceTokenizer."""
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}, additional_special_tokens=list(tokens)
    )


MISTRAL_MODELS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7m1",
}


def mixtral_model(version: str = "v1") -> Path:
    """Returns the path of Mistral's tokenizer.model from mistral-common; v1 is Mixtral 8x7B's."""
    return Path(str(importlib.resources.files("mistral_common") / "data" / MISTRAL_MODELS[version]))


def convert_mistral(version: str, folder: Path) -> Path:
    """Writes Mistral's tokenizer as a Hugging Face folder, converted as transformers does."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(mixtral_model(version).read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    fast = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, legacy=True)
    control = [AddedToken(piece.piece, normalized=False, special=True) for piece in proto.pieces if piece.type == 3]
    fast.add_tokens(control)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)
    return folder


def load_tokenizer(path: Path) -> MegatronTokenizer:
    """Loads a SentencePiece model as Megatron's build_tokenizer does for --tokenizer-type SentencePieceTokenizer."""
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path),
        metadata_path={"library": "sentencepiece"},
        chat_template=None,
        ignore_extra_whitespaces=True,
        legacy=False,
        special_tokens=None,
    )


@pytest.fixture(scope="session", autouse=True)
def cheap_collection() -> Iterator[None]:
    """Freezes the garbage collector's objects: energon collects whenever a loader starts, which would take 0.5 s.

    It also unfreezes all of them when a loader ends, after which workers would take 3 s to start; here it does not.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        kept = SimpleNamespace(
            collect=gc.collect, get_objects=gc.get_objects, freeze=lambda: None, unfreeze=lambda: None
        )
        patched.setattr(gc_dataset, "gc", kept)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model without image tokens and without a padding token, like Mixtral's."""
    return train_sentencepiece(tmp_path_factory.mktemp("plain") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """A tokenizer that was trained with the image tokens and a padding token."""
    path = tmp_path_factory.mktemp("image") / "tokenizer.model"
    return load_tokenizer(train_sentencepiece(path, user_defined_symbols=list(IMAGE_TOKENS), pad_id=3))


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """Mixtral's tokenizer, with the image tokens and ChatML's tokens added after its own."""
    path = tmp_path_factory.mktemp("mixtral") / "tokenizer.model"
    add_tokens(mixtral_model(), path, [*IMAGE_TOKENS, *CHATML_TOKENS])
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """A Hugging Face tokenizer like Qwen's: no beginning of sentence, ChatML's tokens."""
    return load_huggingface(train_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> MegatronTokenizer:
    """A Hugging Face tokenizer like Mixtral's: a space before every piece of text, byte fallback."""
    folder = train_llama_like(tmp_path_factory.mktemp("llama_like"))
    return load_huggingface(folder, [*IMAGE_TOKENS, *CHATML_TOKENS])


@pytest.fixture(scope="session")
def prepare_module() -> ModuleType:
    """tools/data/prepare.py as a module."""
    return megatron_smar.data.preparation


def picture(colour: Any = "red", size: tuple[int, int] = (20, 12), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Returns the bytes of an image file."""
    Image.new(mode, size, colour).save(stream := io.BytesIO(), format=kind)
    return stream.getvalue()


def talk(*texts: str) -> list[dict[str, str]]:
    """Returns the turns of a conversation that starts with the user."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_records(folder: Path, count: int, split: str = "train") -> Path:
    """Writes records with 0, 1 and 2 images, and plain texts, with the images in folder/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        names = [f"{split}{i}-{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            (folder / "images" / name).write_bytes(picture((i % 256, 10 * k, 7)))
        if i % 5 == 4:
            names = []
            records.append({"id": f"{split}{i}", "text": f"The sun rises, {i}."})
        else:
            tags = "<image>\n" * len(names)
            records.append({"id": f"{split}{i}", "conversations": talk(f"{tags}Where is it? {i}", f"There, {i}.")})
        if names:
            records[-1]["image"] = names
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, prepare_module: ModuleType) -> Path:
    """Prepared shards of 50 training and 11 validation samples."""
    folder = tmp_path_factory.mktemp("shards")
    prepare_module.prepare(
        folder / "out",
        [write_records(folder, 50)],
        [write_records(folder, 11, "val")],
        image_root=folder / "images",
        samples_per_shard=8,
        progress=False,
    )
    return folder / "out"


@pytest.fixture
def make_config(shards: Path) -> Callable[..., DataConfig]:
    """A configuration over `shards`; keyword arguments replace fields."""

    def make(**changes: Any) -> DataConfig:
        fields: dict[str, Any] = {
            "data_path": str(shards),
            "seq_length": 256,
            "micro_batch_size": 2,
            "tokens_per_tile": 4,
            "image": ImageConfig(image_size=16),
            "num_workers": 0,
            "shuffle_buffer_size": 10,
            "max_samples_per_sequence": 4,
        }
        return DataConfig(**(fields | changes))

    return make
