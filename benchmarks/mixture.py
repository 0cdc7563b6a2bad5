# SPDX-License-Identifier: Apache-2.0
"""Synthetic data for benchmarks, with real text, a real photograph, and the lengths and sizes of LLaVA-1.5's mixture.

benchmarks/packing.py says where the numbers of the mixture's sources come from.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from packing import LONGEST_TEXT, SOURCES, Source  # benchmarks/packing.py
from PIL import Image
from tqdm import tqdm

from megatron_smar.data.conversations import IMAGE_TAG
from megatron_smar.data.tokens import IMAGE_TOKENS

PREPARE = Path(__file__).resolve().parents[1] / "tools" / "data" / "prepare.py"
WORDS_PER_TOKEN = 0.65  # of the text of `read_text` with the tokenizer trained on it


def make_data(folder: Path, samples: int, seed: int = 1) -> None:
    """Writes train.json, images/, tokenizer.model and the shards/ made from them; the same for equal arguments."""
    random = np.random.default_rng(seed)
    text = read_text()
    train_tokenizer(text, folder / "tokenizer.model")
    words, photo = text.split(), read_photo()
    grain = random.normal(0, 6, (2000, 2000, 1)).astype(np.float32)
    shares = np.array([source.thousands for source in SOURCES.values()])
    sources = random.choice(len(SOURCES), samples, p=shares / shares.sum())
    (folder / "images").mkdir()
    records = []
    for number, source in enumerate(tqdm([list(SOURCES.values())[i] for i in sources], desc="pictures", disable=None)):
        record: dict[str, Any] = {"id": str(number), "conversations": make_turns(source, words, random)}
        if source.size is not None:
            record["conversations"][0]["value"] = f"{IMAGE_TAG}\n{record['conversations'][0]['value']}"
            is_png = random.random() < 0.04
            record["image"] = f"images/{number}.{'png' if is_png else 'jpg'}"
            picture = make_picture(photo, grain, source.size, random)
            picture.save(folder / record["image"], quality=90)  # PNG ignores the quality
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    prepare: list[str | Path] = [sys.executable, PREPARE, "--train", folder / "train.json", "--image-root", folder]
    done = subprocess.run(
        [*prepare, "--output", folder / "shards", "--samples-per-shard", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"tools/data/prepare.py failed:\n{done.stdout}")


def read_text() -> str:
    """Returns real English text: the topics of Python's own documentation."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def train_tokenizer(text: str, path: Path) -> None:
    """Trains a SentencePiece model with Mixtral's settings and the image tokens."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=(model := io.BytesIO()),
        model_type="bpe",
        vocab_size=4000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(IMAGE_TOKENS),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def make_turns(source: Source, words: list[str], random: np.random.Generator) -> list[dict[str, str]]:
    """Returns questions and answers with this source's distribution of lengths; answers have two thirds of them."""
    turns = random.geometric(1 / source.turns) if source.size is None else 1 + random.poisson(source.turns - 1)
    lengths = random.lognormal(np.log(source.tokens) - source.spread**2 / 2, source.spread, turns)
    within = lengths[lengths.cumsum() <= LONGEST_TEXT - 500]
    conversation = []
    for tokens in within if len(within) else [LONGEST_TEXT / 2]:
        for speaker, share in (("human", 1 / 3), ("gpt", 2 / 3)):
            count = max(1, round(tokens * share * WORDS_PER_TOKEN))
            begin = int(random.integers(len(words) - count))
            conversation.append({"from": speaker, "value": " ".join(words[begin : begin + count])})
    return conversation


def read_photo() -> Image.Image:
    """Returns the sample photograph of matplotlib."""
    from matplotlib import cbook

    return Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")


def make_picture(
    photo: Image.Image, grain: np.ndarray, size: tuple[int, int], random: np.random.Generator
) -> Image.Image:
    """Returns a crop of the photograph, randomly mirrored and recolored, with grain; a quarter of them is rotated."""
    shapes = (size, size[::-1], (336, 336))
    width, height = shapes[random.choice(3, p=[0.65, 0.25, 0.1])]
    scale = random.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
    left = random.uniform(0, photo.width - scale * width)
    upper = random.uniform(0, photo.height - scale * height)
    box = (left, upper, left + scale * width, upper + scale * height)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box))[:, :: random.choice([-1, 1])]
    top, start = random.integers(2000 - height), random.integers(2000 - width)
    noisy = pixels * random.uniform(0.7, 1.1, 3) + grain[top : top + height, start : start + width]
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
