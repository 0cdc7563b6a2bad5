# SPDX-License-Identifier: Apache-2.0
"""A user's files, small and real: images, records, shards, a tokenizer, a vision encoder."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, SMALL_MODEL, TWO_STEPS, run, run_each_rank

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


@dataclass(frozen=True)
class World:
    """The user's files and flags.

    Attributes:
        root: Folder of all files.
        flags: The model's flags and paths, for pretrain_vlm.py.
    """

    root: Path
    flags: list[str]

    def train(self, *flags: object, ranks: int = 1, **options: object):
        """Runs pretrain_vlm.py."""
        return run("pretrain_vlm.py", *self.flags, *flags, ranks=ranks, **options)

    def errors(self, *flags: object, ranks: int = 2, **options: object) -> list[str]:
        """Runs pretrain_vlm.py with flags that it must refuse, and returns the error message of each rank."""
        command = ["pretrain_vlm.py", *self.flags, *flags]
        sentences = []
        for done in run_each_rank(*command, ranks=ranks, check=False, timeout=120, **options):
            assert done.returncode != 0, "a rank accepted the flags"
            assert "iteration        1/" not in done.stdout, "training began"
            said = [line for line in done.stdout.splitlines() if line.startswith("pretrain_vlm.py: error: ")]
            assert len(said) == 1, f"one sentence per rank, not:\n{done.stdout[-3000:]}"
            sentences += said
        return sentences


def make_records(root: Path, number: int) -> list[dict]:
    """Makes questions about the colours of plain images, with one image, two, or none."""
    from PIL import Image

    rng = random.Random(5)
    for name, value in COLOURS.items():
        Image.new("RGB", (40, 30), value).save(root / f"{name}.png")
    records = []
    for index in range(number):
        chosen = rng.sample(list(COLOURS), index % 3)
        question = "<image>\n" * len(chosen) + ("Which colours are these?" if chosen else "Name a colour, please.")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " and ".join(chosen) or "red"}]
        records.append({"id": str(index), "image": [f"{name}.png" for name in chosen], "conversations": turns})
    return records


def train_tokenizer(path: Path) -> None:
    """Trains a sentencepiece model on English text, with the image tokens."""
    import sentencepiece

    text = [line.strip() for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()]
    text += ["Which colours are these? red green blue white and Name a colour, please. [INST] [/INST]"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        user_defined_symbols=["<img>", "</img>", "<IMG_CONTEXT>"],
        minloglevel=2,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Makes the files once for all functional tests, with the project's programs."""
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> World:
    """Makes the files in a folder."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    root.mkdir(exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    vision = InternVLVisionConfig(**sizes, image_size=[32, 32], patch_size=[8, 8])
    InternVLVisionModel(vision).save_pretrained(root / "vision")
    train_tokenizer(root / "tokenizer.model")
    records = make_records(root, 96)
    (root / "train.json").write_text(json.dumps(records[:80]))
    (root / "valid.json").write_text(json.dumps(records[80:]))
    (root / "text.json").write_text(json.dumps([r for r in records if not r["image"]]))
    for name, valid in (("train", ["--valid", root / "valid.json"]), ("text", [])):
        command = ["--train", root / f"{name}.json", *valid, "--image-root", root, "--output", root / "shards" / name]
        run("tools/data/prepare.py", *command, "--samples-per-shard", 10)
    paths = {
        "--vision-model": root / "vision",
        "--tokenizer-model": root / "tokenizer.model",
        "--data-path": root / "shards" / "train",
        "--tokenizer-type": "SentencePieceTokenizer",
    }
    training = (
        "--eval-iters 0 --lr 1e-2 --lr-decay-style constant --log-interval 1 --tensorboard-log-interval 1".split()
    )
    return World(root, [*SMALL_MODEL, *training, *(str(x) for pair in paths.items() for x in pair)])


@pytest.fixture
def convert(capsys, monkeypatch, single_rank):
    """Runs convert.py in this process, which has already imported Megatron; returns exit status and output."""
    from megatron_smar.commands.convert import main

    def call(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        written = capsys.readouterr()
        return status, written.out + written.err

    return call


@pytest.fixture(scope="session")
def saved(world, tmp_path_factory) -> Path:
    """Returns the --save folder of the world's model after two steps; tests must not write to it."""
    folder = tmp_path_factory.mktemp("saved")
    world.train(*TWO_STEPS, "--save", folder, "--save-interval", "2")
    return folder
