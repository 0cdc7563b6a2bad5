# SPDX-License-Identifier: Apache-2.0
"""Converts a LLaVA with Phi-2, as saved by MoE-LLaVA's code, to the format that tools/checkpoint/convert.py reads.

    python examples/moe_llava_phi/from_llava.py --llava FOLDER --vision FOLDER --output FOLDER

Language model and connector come from --llava, the vision encoder, which MoE-LLaVA never trains, from --vision. Phi's
output layer has a bias and LLaVA's does not: the bias becomes zero. The image tokens get the ids after the tokenizer's
last, for which Phi's vocabulary has room.

The names are those of MoE-LLaVA's code (moellava/model); they have not been tried with published weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PhiConfig

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.checkpoint.safetensors_io import Stored, read_folder, write_folder
from megatron_smar.conversion import composite
from megatron_smar.data.tokens import IMAGE_CONTEXT, add_tokens

# Prefix of MoE-LLaVA's names -> prefix in the output; None if the weights are not converted.
PREFIXES = {
    "model.mm_projector.image_spatial_proj.0.": f"{composite.PROJECTOR}linear_1.",
    "model.mm_projector.image_spatial_proj.2.": f"{composite.PROJECTOR}linear_2.",
    "model.image_tower.": None,
    "model.": f"{composite.LANGUAGE}model.",
    "lm_head.": f"{composite.LANGUAGE}lm_head.",
}
OUTPUT_BIAS = f"{composite.LANGUAGE}lm_head.bias"
CONNECTION = composite.Connection(connector="mlp2x_gelu", pixel_shuffle=1.0, feature_layer=-2)


def renamed(name: str) -> str | None:
    """Returns a weight's new name, or None if the weight is not converted.

    Raises:
        ValueError: MoE-LLaVA has no weight of this name.
    """
    for prefix, replacement in PREFIXES.items():
        if name.startswith(prefix):
            return None if replacement is None else replacement + name.removeprefix(prefix)
    raise ValueError(f"{name} is not a weight of a LLaVA with Phi-2 as MoE-LLaVA saves it.")


def read_weights(llava: Path, vision: Path, config: object) -> dict[str, Stored]:
    """Returns the stored weights by their new names."""
    tower = read_folder(vision)
    names = composite.part_of(tower, composite.VISION, config.vision_config)  # type: ignore[attr-defined]
    weights = {new: tower[name] for name, new in names.items()}
    for name, stored in read_folder(llava).items():
        new = renamed(name)
        if new is not None:
            weights[new] = stored
    return weights


def read_language_config(llava: Path) -> PhiConfig:
    """Reads Phi's part of the config.

    Raises:
        ValueError: The config is of another model.
    """
    content = json.loads((llava / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") != "llava_phi" or content.get("image_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"{llava} has the model_type {content.get('model_type')!r} and the image_projector_type "
            f"{content.get('image_projector_type')!r}; this program takes 'llava_phi' with 'mlp2x_gelu'."
        )
    known = PhiConfig().to_dict()
    rope = {"partial_rotary_factor", "rope_theta"}
    return PhiConfig(**{k: v for k, v in content.items() if (k in known or k in rope) and k != "model_type"})


def convert(llava: Path, vision: Path, output: Path) -> None:
    """Writes the output folder: config, tokenizer with image tokens, and weights.

    Raises:
        ValueError: An input folder does not have the expected content, or `output` exists.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists already; give a new folder.")
    language = read_language_config(llava)
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    add_tokens(llava, partial)
    tokenizer = AutoTokenizer.from_pretrained(partial, trust_remote_code=False)
    if len(tokenizer) > language.vocab_size:
        raise ValueError(f"the vocabulary of {llava} has no room for the image tokens ({language.vocab_size} rows).")
    image_token_id = tokenizer.get_vocab()[IMAGE_CONTEXT]
    config = composite.combine(language, composite.load_config(vision), CONNECTION, image_token_id, len(tokenizer))
    config.save_pretrained(partial)
    weights = read_weights(llava, vision, config)
    layout = {name: (stored.shape, stored.dtype) for name, stored in weights.items()}
    embedding = weights[f"{composite.LANGUAGE}model.embed_tokens.weight"]
    layout.setdefault(OUTPUT_BIAS, ((language.vocab_size,), embedding.dtype))

    def read(name: str) -> Tensor:
        return weights[name].read() if name in weights else torch.zeros(layout[name][0], dtype=embedding.dtype)

    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {output}") as bar:
        write_folder(partial, layout, read, bar.update)
    partial.rename(output)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", type=Path, required=True, help="folder of MoE-LLaVA's second stage, as safetensors")
    parser.add_argument("--vision", type=Path, required=True, help="folder of its vision encoder")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    try:
        convert(args.llava, args.vision, args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
