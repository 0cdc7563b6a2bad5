# SPDX-License-Identifier: Apache-2.0
"""Makes the inputs of a recipe's `--tiny`: a small random model of the recipe's architecture, images, texts and shards.

    python examples/tiny.py RECIPE --output FOLDER

It writes to the folder, in the same formats as a user's own data:

    language/, vision/      Hugging Face folders with random weights; language/ with a tokenizer
    llava/                  moe_llava_phi: language/ and a connector under MoE-LLaVA's names
    stage1/, stage2/        shards made by tools/data/prepare.py
    text.jsonl, vqa.json, images/    inputs of tools/evaluate.py

The images are parts of matplotlib's sample images, the texts are paragraphs of this project's license. Mixtral gets its
own tokenizer (package mistral-common), the others a byte-level tokenizer trained on the license.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from architectures import ARCHITECTURES
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_smar.data.preparation import prepare

PICTURES = {  # of matplotlib's sample data
    "the portrait of Grace Hopper": "grace_hopper.jpg",
    "the present by Minduka": "Minduka_Present_Blue_Pack.png",
    "the logo": "logo2.png",
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
# Special tokens of the published tokenizers: the end-of-text token first, then those of the conversation template.
BYTE_LEVEL_TOKENS = {
    "qwen3_30b_a3b_internvl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "moe_llava_phi": ["<|endoftext|>"],
}


def make_tokenizer(recipe: str, output: Path) -> None:
    """Writes the language model's tokenizer, without image tokens, in the form of the published folder.

    Raises:
        SystemExit: The package with Mixtral's tokenizer is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    if recipe in BYTE_LEVEL_TOKENS:
        _train_byte_level(BYTE_LEVEL_TOKENS[recipe], output)
        return
    try:
        published = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    except ModuleNotFoundError:
        sys.exit("Mixtral's tokenizer comes with the package mistral-common: pip install 'megatron_smar[dev]'.")
    with resources.as_file(published) as path:
        shutil.copyfile(path, output / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names}
    (output / "tokenizer_config.json").write_text(json.dumps(settings))


def _train_byte_level(special: list[str], output: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(passages(), vocab_size=600, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=special[0]).save_pretrained(output)


def make_model(recipe: str, output: Path) -> None:
    """Writes the small language model and the small vision tower, with random weights, biases and norms."""
    torch.manual_seed(0)
    vocab_size = len(AutoTokenizer.from_pretrained(output / "language", trust_remote_code=False))
    # The vocabularies of Qwen and Phi have more rows than tokens, Mixtral's does not.
    language, vision = ARCHITECTURES[recipe].tiny(-(-vocab_size // 128) * 128)
    for name, model in (
        ("language", AutoModelForCausalLM.from_config(language)),
        ("vision", AutoModel.from_config(vision)),
    ):
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(output / name)


def make_llava(output: Path) -> None:
    """Writes the small Phi and a random connector in the format in which MoE-LLaVA's code saves its second stage."""
    language, vision = output / "language", json.loads((output / "vision" / "config.json").read_text())
    (output / "llava").mkdir(exist_ok=True)
    for path in language.glob("tokenizer*"):
        shutil.copyfile(path, output / "llava" / path.name)
    config = json.loads((language / "config.json").read_text())
    config |= config.pop("rope_parameters")  # as in transformers 4.37
    more = {"model_type": "llava_phi", "image_projector_type": "mlp2x_gelu", "mm_hidden_size": vision["hidden_size"]}
    (output / "llava" / "config.json").write_text(json.dumps(config | more))
    weights = load_file(language / "model.safetensors")
    del weights["lm_head.bias"]
    sizes = {0: (config["hidden_size"], vision["hidden_size"]), 2: (config["hidden_size"],) * 2}
    for number, shape in sizes.items():
        name = f"model.mm_projector.image_spatial_proj.{number}"
        weights |= {
            f"{name}.weight": torch.randn(shape) * shape[1] ** -0.5,
            f"{name}.bias": torch.randn(shape[0]) * 0.1,
        }
    save_file(weights, output / "llava" / "model.safetensors", metadata={"format": "pt"})


def passages() -> list[str]:
    """Returns the license's paragraphs, each on one line."""
    paragraphs = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if len(paragraph) > 100]


def parts(output: Path) -> Iterator[tuple[str, str, str]]:
    """Crops each image into nine parts; yields each part's file relative to `output`, its image and its position."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    for number, (picture, file) in enumerate(PICTURES.items()):
        with cbook.get_sample_data(file) as opened:
            image = Image.open(opened).convert("RGB")
        width, height = image.width // 3, image.height // 3
        for row, vertical in enumerate(ROWS):
            for column, horizontal in enumerate(COLUMNS):
                path = f"images/{number}{row}{column}.png"
                left, top = column * width, row * height
                image.crop((left, top, left + width, top + height)).resize((112, 84)).save(output / path)
                yield path, picture, f"{vertical} {horizontal}"


def conversation(key: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """Returns a record in LLaVA's format."""
    human = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": key, **({"image": image} if image else {}), "conversations": turns}


def make_data(output: Path) -> None:
    """Writes the shards of both stages and the files for the evaluation."""
    captions, questions, items = [], [], []
    for path, picture, place in parts(output):
        captions.append(conversation(path, path, "Describe the picture.", f"The {place} of {picture}."))
        asked = f"Which part of {picture} is this?"
        questions.append(conversation(path, path, asked, place))
        items.append({"id": path, "image": [path], "question": f"<image>\n{asked}", "answer": place, "kind": "place"})
    texts = [text[:300] for text in passages()]
    for number, text in enumerate(texts):
        start, _, rest = text.partition(" ")
        questions.append(conversation(f"text-{number}", None, f"Continue the text: {start}", rest))
    for stage, records in (("stage1", captions), ("stage2", questions)):
        file = output / f"{stage}.json"
        file.write_text(json.dumps(records))
        prepare(output / stage, [file], image_root=output, valid_fraction=0.2, overwrite=True, progress=False)
    (output / "vqa.json").write_text(json.dumps(items[::3]))
    (output / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:4]))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=ARCHITECTURES)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    options = parser.parse_args()
    make_tokenizer(options.recipe, options.output / "language")
    make_model(options.recipe, options.output)
    if options.recipe == "moe_llava_phi":
        make_llava(options.output)
    make_data(options.output)


if __name__ == "__main__":
    main()
