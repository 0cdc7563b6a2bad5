# SPDX-License-Identifier: Apache-2.0
"""Makes small versions of a user's files with the project's tools: images, records, shards, tokenizer, vision tower."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.gpu.context import ROOT, Context, Findings

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RECORDS = 160

# Mixtral's architecture; every width is a multiple of 64, as preferred by Transformer Engine's kernels.
MODEL = """
    --image-size 32 --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --num-experts 4 --moe-router-topk 2
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --make-vocab-size-divisible-by 64 --seed 7
""".split()
# The same kind of layers on both devices, even if Transformer Engine or apex would change Megatron's defaults.
LOCAL = "--transformer-impl local --no-rope-fusion --no-gradient-accumulation-fusion".split()
SMAR = "--modality-routing smar --smar-d-min 3 --smar-d-max 4 --smar-coeff 0.1 --freeze vision".split()


def training_flags(files: Path) -> list[str]:
    """Returns the flags of pretrain_vlm.py for the model and these files."""
    training = f"""
        --data-path {files / "shards"} --vision-model {files / "vision"} --conversation-template chatml
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model {files / "tokenizer"}
        --seq-length 128 --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 8 --num-workers 1
        --lr-decay-style constant --eval-iters 0 --log-interval 1
    """.split()
    return [*MODEL, *SMAR, *training]


def make(context: Context, findings: Findings) -> None:
    """The step `files`."""
    from megatron_smar.data.preparation import prepare
    from megatron_smar.data.tokens import IMAGE_TOKENS, add_tokens

    folder = context.files
    folder.mkdir(parents=True, exist_ok=True)
    records = make_records(folder)
    (folder / "train.json").write_text(json.dumps(records))
    prepare(folder / "shards", [folder / "train.json"], image_root=folder, overwrite=True, progress=False, workers=1)
    make_tokenizer(folder / "plain-tokenizer")
    add_tokens(folder / "plain-tokenizer", folder / "tokenizer", [*IMAGE_TOKENS])
    make_vision_tower(folder / "vision")
    write_held_out(folder, records[:8])
    findings.note("records", len(records))
    findings.note("shards", len(list((folder / "shards").rglob("*.tar"))))


def make_records(folder: Path) -> list[dict[str, Any]]:
    """Makes questions about the colours of plain images: one image, two, or none."""
    from PIL import Image

    rng = random.Random(5)
    for name, value in COLOURS.items():
        Image.new("RGB", (40, 30), value).save(folder / f"{name}.png")
    records = []
    for index in range(RECORDS):
        colours = rng.sample(list(COLOURS), index % 3)
        question = "<image>\n" * len(colours) + ("Which colours are these?" if colours else "Name a colour, please.")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " and ".join(colours) or "red"}]
        records.append({"id": str(index), "image": [f"{name}.png" for name in colours], "conversations": turns})
    return records


def make_tokenizer(folder: Path) -> None:
    """Trains a byte-level tokenizer on the license, which needs no package besides transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
    text += ["Which colours are these? red green blue white and Name a colour, please."] * 20
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=500, special_tokens=SPECIAL_TOKENS, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=SPECIAL_TOKENS[0])
    fast.save_pretrained(folder)


def make_vision_tower(folder: Path) -> None:
    """Saves an InternViT with one layer and random weights."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    InternVLVisionModel(InternVLVisionConfig(**sizes, image_size=[32, 32], patch_size=[8, 8])).save_pretrained(folder)


def make_language_model(folder: Path, tokenizer: Path) -> None:
    """Saves a Mixtral with random weights in Hugging Face's format, with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=-(-len(words) // 64) * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write_held_out(folder: Path, records: list[dict[str, Any]]) -> None:
    """Writes the input files of tools/evaluate.py."""
    items = [
        {"image": r["image"], "question": r["conversations"][0]["value"], "answer": r["conversations"][1]["value"]}
        for r in records
        if r["image"]
    ]
    (folder / "vqa.json").write_text(json.dumps(items))
    (folder / "text.jsonl").write_text(json.dumps({"text": "You may reproduce and distribute copies of the Work."}))
