# SPDX-License-Identifier: Apache-2.0
"""The demo's language data: real English documents split into passages, a tokenizer, and a perplexity baseline.

Encyclopedic text (Wikipedia summaries, BoolQ and QuAC passages) is split at sentence ends into passages. Entire
documents are held out, so that no held-out passage continues a training passage. Files in the output folder:

    train.jsonl, held_out.jsonl     {"id", "document", "text"}, one passage per line
    tokenizer.model                 sentencepiece BPE with Mixtral's settings
    text_instructions.json          conversations made from training passages, for the pure text of stage 2
    summary.json                    `CorpusSummary`
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, exp, log
from pathlib import Path

import sentencepiece
from sources import DEFAULT_CACHE, READING, WIKIPEDIA, SourceError, members

IMAGE_SYMBOLS = ("<img>", "</img>", "<IMG_CONTEXT>")
INSTRUCTION_SYMBOLS = ("[INST]", "[/INST]")  # one piece each, as in Mistral's own newer tokenizers
INSTRUCTION_MARGIN = 48  # tokens left for a chat template and the instruction's own words
_ABBREVIATIONS = ("[A-Z]", "St", "Mt", "Dr", "Mr", "Mrs", "Jr", "Sr", "No", "vs")
_NO_ABBREVIATION = "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS)
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_NO_ABBREVIATION}[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\s*\n+\s*")


@dataclass(frozen=True)
class Document:
    """One source text. Texts with the same key (a title) are all held out, or all used for training."""

    key: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Consecutive complete sentences from one document, which is named by a hash of its key."""

    id: str
    document: str
    text: str


@dataclass(frozen=True)
class CorpusConfig:
    """Settings for splitting and tokenizing the corpus.

    Attributes:
        max_chars: Maximum length of a passage in characters.
        min_chars: Minimum length of a passage in characters; shorter passages are left out.
        max_tokens: Maximum length of a passage in tokens, with `<s>` and `</s>`.
        held_out_percent: Percentage of the documents that is held out.
        vocab_size: Number of the tokenizer's pieces, with bytes and special symbols.
        tokenizer_passages: Number of training passages that the tokenizer is trained on.
        instructions: Number of conversations to make from training passages.
        seed: Seed of all random choices.
    """

    max_chars: int = 700
    min_chars: int = 80
    max_tokens: int = 256
    held_out_percent: int = 2
    vocab_size: int = 4096
    tokenizer_passages: int = 8000
    instructions: int = 1000
    seed: int = 1234

    def __post_init__(self) -> None:
        """Refuses invalid values."""
        if self.vocab_size < 400:
            raise ValueError(f"vocab_size is {self.vocab_size}: at least 400, since bytes alone take 256 pieces.")
        if not 0 < self.min_chars < self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} and max_chars {self.max_chars}: must be 0 < min < max.")
        if self.max_tokens <= INSTRUCTION_MARGIN:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: must be over {INSTRUCTION_MARGIN}, room for an instruction."
            )
        if not 0 < self.held_out_percent < 100:
            raise ValueError(f"held_out_percent is {self.held_out_percent}: must be between 1 and 99.")


@dataclass(frozen=True)
class CorpusSummary:
    """Measured sizes, and the perplexity of a model that ignores the context.

    Attributes:
        unigram_perplexity: Held-out perplexity per token under the token frequencies of the training text.
    """

    documents: int
    held_out_documents: int
    train_passages: int
    held_out_passages: int
    train_characters: int
    train_tokens: int
    held_out_tokens: int
    vocab_size: int
    instructions: int
    unigram_perplexity: float


def read_documents(cache: Path) -> list[Document]:
    """Reads the texts of the fetched sources, without duplicates."""
    wikipedia = json.loads(members(WIKIPEDIA, cache)[0].read_text(encoding="utf-8"))
    pairs = [(article["title"], article["extract"]) for article in wikipedia.values()]
    *boolq, quac = members(READING, cache)
    for record in (json.loads(line) for path in boolq for line in path.open(encoding="utf-8")):
        passage = record["passage"].replace("``", '"').replace("''", '"')
        title, _, body = passage.partition(" -- ")  # one of the files has the title in a separate field
        pairs.append((record["title"], passage) if "title" in record else (title, body or passage))
    for line in quac.open(encoding="utf-8"):
        passage = json.loads(line)["passage"].removesuffix("CANNOTANSWER")
        pairs.append((passage, passage))
    documents: dict[str, Document] = {}
    for title, text in pairs:
        text = "\n".join(" ".join(line.split()) for line in text.strip().splitlines())
        documents.setdefault(text, Document(title.strip().casefold(), text))
    documents.pop("", None)
    return list(documents.values())


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences: at line ends, but not after an initial or a common abbreviation."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        end = match.start() + len(match.group().rstrip())  # a closing quote belongs to the sentence it closes
        sentences.append(text[start:end].strip())
        start = match.end()
    return [sentence for sentence in [*sentences, text[start:].strip()] if sentence]


def split_passages(text: str, max_chars: int) -> list[str]:
    """Splits a text into passages of complete sentences, of about equal length, each at most `max_chars` long.

    A longer sentence is split between words; a longer word is not split.
    """
    pieces: list[str] = []
    for sentence in split_sentences(text):
        fits = len(sentence) <= max_chars
        pieces += (
            [sentence] if fits else textwrap.wrap(sentence, max_chars, break_long_words=False, break_on_hyphens=False)
        )
    total = sum(map(len, pieces)) + len(pieces)
    target = total / max(1, ceil(total / max_chars))
    passages: list[str] = []
    length = 0.0
    for piece in pieces:
        if passages and length + len(piece) / 2 <= target and len(passages[-1]) + 1 + len(piece) <= max_chars:
            passages[-1] += " " + piece
            length += len(piece) + 1
        else:
            passages.append(piece)
            length = len(piece)
    return passages


def is_held_out(key: str, percent: int) -> bool:
    """Returns whether a document is held out, which depends only on its key, not on order or other documents."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 100 < percent


def split_documents(documents: Iterable[Document], percent: int) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and held-out ones, which share no key and no sentence of 40 characters or more.

    Articles quote each other: a key chosen to be held out moves to training if a sentence of its documents is there.
    """
    train: list[Document] = []
    candidates: list[Document] = []
    for document in documents:
        (candidates if is_held_out(document.key, percent) else train).append(document)

    def long_sentences(document: Document) -> list[str]:
        return [sentence for sentence in split_sentences(document.text) if len(sentence) >= 40]

    seen = {sentence for document in train for sentence in long_sentences(document)}
    while shared := {document.key for document in candidates if not seen.isdisjoint(long_sentences(document))}:
        moved = [document for document in candidates if document.key in shared]
        candidates = [document for document in candidates if document.key not in shared]
        train += moved
        seen.update(sentence for document in moved for sentence in long_sentences(document))
    return train, candidates


def make_passages(documents: Iterable[Document], config: CorpusConfig) -> list[Passage]:
    """Makes the passages of the documents, without duplicates; ids are hashes, and sorting by id shuffles them."""
    passages: dict[str, Passage] = {}
    for document in documents:
        for text in split_passages(document.text, config.max_chars):
            if len(text) >= config.min_chars:
                passages.setdefault(text, Passage(_hash(text), _hash(document.key), text))
    return sorted(passages.values(), key=lambda passage: passage.id)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_tokenizer(
    passages: Sequence[Passage], config: CorpusConfig, output: Path
) -> sentencepiece.SentencePieceProcessor:
    """Trains a BPE tokenizer with Mixtral's settings and writes it.

    Symbols for images and instructions are separate pieces; ids are `<unk>` 0, `<s>` 1, `</s>` 2, `<pad>` 3. BPE is
    deterministic and the first passages in the order of their hashes are used, so the same text gives the same model.
    """
    sample = passages[: config.tokenizer_passages]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(passage.text for passage in sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=[*IMAGE_SYMBOLS, *INSTRUCTION_SYMBOLS],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 20,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = f"No tokenizer of vocab_size {config.vocab_size} can be trained on {len(sample)} passages: {error}"
        raise ValueError(message) from None
    output.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fit_passages(
    passages: Sequence[Passage], tokenizer: sentencepiece.SentencePieceProcessor, max_tokens: int
) -> tuple[list[Passage], list[int]]:
    """Splits passages that have too many tokens; returns passages and their lengths with `<s>` and `</s>`."""
    fitting: list[Passage] = []
    lengths: list[int] = []
    queue = list(passages)
    while queue:
        too_long: list[Passage] = []
        for passage, ids in zip(queue, tokenizer.encode([p.text for p in queue], num_threads=2), strict=True):
            length = len(ids) + 2
            if length <= max_tokens:
                fitting.append(passage)
                lengths.append(length)
            elif len(passage.text.split()) > 1:
                parts = split_passages(passage.text, ceil(len(passage.text) / 2))
                too_long += [replace(passage, id=f"{passage.id}-{n}", text=part) for n, part in enumerate(parts)]
        queue = too_long
    return fitting, lengths


def text_conversations(passages: Sequence[Passage], count: int, seed: int) -> list[dict[str, object]]:
    """Makes conversations from passages of two sentences or more, without images, in LLaVA's format."""
    rng = random.Random(seed)
    records: list[dict[str, object]] = []
    for passage in rng.sample(passages, len(passages)):
        sentences = split_sentences(passage.text)
        if len(records) == count:
            break
        if len(sentences) < 2:
            continue
        cut = rng.randrange(1, len(sentences))
        start = " ".join(sentences[:cut])
        if rng.random() < 0.5:
            question, answer = f"Continue the text: {start}", " ".join(sentences[cut:])
        else:
            question, answer = f"{start}\nWhat is the next sentence?", sentences[cut]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"text-{passage.id}", "conversations": turns})
    return records


def unigram_perplexity(
    tokenizer: sentencepiece.SentencePieceProcessor, train: Sequence[str], held_out: Sequence[str]
) -> float:
    """Returns the perplexity per token of held-out text under a unigram model: training frequencies, plus one.

    Every piece and the `</s>` at the end of a text are counted; `<s>` is given, not predicted.
    """

    def count(texts: Sequence[str]) -> Counter[int]:
        counts = Counter({tokenizer.eos_id(): len(texts)})
        for ids in tokenizer.encode(list(texts), num_threads=2):
            counts.update(ids)
        return counts

    train_counts, held_counts = count(train), count(held_out)
    total = sum(train_counts.values()) + tokenizer.vocab_size()
    surprise = sum(number * -log((train_counts[token] + 1) / total) for token, number in held_counts.items())
    return exp(surprise / sum(held_counts.values()))


def prepare(cache: Path, output: Path, config: CorpusConfig | None = None) -> CorpusSummary:
    """Makes all language data (see the module's docstring) from the fetched sources.

    Args:
        cache: Folder where `sources.fetch` stored the sources.
        output: Folder to write to.
        config: Settings of the corpus; the defaults if None.

    Returns:
        The summary, which is also written to the folder.

    Raises:
        SourceError: The sources have not been fetched.
        ValueError: The tokenizer cannot be trained with this vocabulary size.
    """
    config = config or CorpusConfig()
    output.mkdir(parents=True, exist_ok=True)
    train_documents, held_documents = split_documents(read_documents(cache), config.held_out_percent)
    train, held_out = (make_passages(documents, config) for documents in (train_documents, held_documents))
    tokenizer = train_tokenizer(train, config, output / "tokenizer.model")
    train, train_lengths = fit_passages(train, tokenizer, config.max_tokens)
    held_out, held_lengths = fit_passages(held_out, tokenizer, config.max_tokens)
    room = config.max_tokens - INSTRUCTION_MARGIN
    short = [passage for passage, length in zip(train, train_lengths, strict=True) if length <= room]
    instructions = text_conversations(short, config.instructions, config.seed)
    summary = CorpusSummary(
        documents=len(train_documents) + len(held_documents),
        held_out_documents=len(held_documents),
        train_passages=len(train),
        held_out_passages=len(held_out),
        train_characters=sum(len(passage.text) for passage in train),
        train_tokens=sum(train_lengths),
        held_out_tokens=sum(held_lengths),
        vocab_size=tokenizer.vocab_size(),
        instructions=len(instructions),
        unigram_perplexity=unigram_perplexity(tokenizer, [p.text for p in train], [p.text for p in held_out]),
    )
    _write_lines(output / "train.jsonl", train)
    _write_lines(output / "held_out.jsonl", held_out)
    for name, value in (
        ("text_instructions", instructions),
        ("summary", asdict(summary)),
    ):
        (output / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return summary


def _write_lines(path: Path, passages: Sequence[Passage]) -> None:
    lines = (json.dumps(asdict(passage), ensure_ascii=False) + "\n" for passage in passages)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Runs the command line."""
    defaults = CorpusConfig()
    parser = argparse.ArgumentParser(description="Make the demo's language data from the fetched sources.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="fetched sources (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo/corpus"), help="(default: %(default)s)")
    explained = {
        "vocab_size": "pieces of the tokenizer",
        "max_chars": "characters per passage",
        "max_tokens": "tokens per passage",
        "held_out_percent": "percentage of the documents that is held out",
    }
    for name, text in explained.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help=f"{text} (default: %(default)s)")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        config = CorpusConfig(**{name: getattr(arguments, name) for name in explained})
        summary = prepare(arguments.cache, arguments.output, config)
    except (SourceError, ValueError) as error:
        sys.exit(str(error))
    for name, value in asdict(summary).items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value:.4f}")
    print(f"corpus in {arguments.output} after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
