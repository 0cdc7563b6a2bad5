# SPDX-License-Identifier: Apache-2.0
"""Compares an export of an imported language model with the original, both loaded by transformers, on texts.

    python examples/smollm2_moe/agreement.py --original FOLDER --export FOLDER --output FILE.json

Exits with 1 if a weight differs in any bit, a logit by more than the tolerance, or a greedy token. The export has more
rows in its vocabulary, for the image tokens; those are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar import huggingface

TEXTS = (
    "The capital of France is",
    "In 1969, 3 astronauts flew to the moon; 2 of them walked on it.",
    "def area(width, height):\n    return width * height\n",
    "The mushrooms at the top left are red, those at the bottom right are brown, and there are no others.",
)


@dataclass(frozen=True)
class Agreement:
    """How closely an export agrees with the original.

    Attributes:
        weights: Number of the original's weights.
        identical: Number of those that are bit-identical in the export.
        difference: Largest absolute difference of a logit.
        largest: Largest absolute logit of the original.
        agreeing: Number of positions at which both have the same most likely token.
        positions: Number of positions compared.
    """

    weights: int
    identical: int
    difference: float
    largest: float
    agreeing: int
    positions: int

    def within(self, tolerance: float) -> bool:
        """Returns whether all weights and greedy tokens are the same and no logit differs by more than `tolerance`."""
        same = self.identical == self.weights and self.agreeing == self.positions
        return same and self.difference <= tolerance


def compare_weights(original: Mapping[str, Tensor], exported: Mapping[str, Tensor]) -> int:
    """Returns how many of the original's weights the export has, bit for bit.

    Args:
        original: The original's weights by name.
        exported: The export's; its names may have a prefix, and its vocabulary more rows.
    """
    identical = 0
    for name, weight in original.items():
        found = [other for other in exported if other == name or other.endswith(f".{name.removeprefix('model.')}")]
        found = [other for other in found if ".vision" not in other]
        identical += len(found) == 1 and torch.equal(exported[found[0]][: len(weight)], weight)
    return identical


@torch.inference_mode()
def compare(original: PreTrainedModel, exported: PreTrainedModel, rows: list[Tensor]) -> Agreement:
    """Compares two models on token ids, one row [1, s] at a time."""
    difference = largest = 0.0
    agreeing = positions = 0
    for ids in rows:
        expected = original(ids).logits
        found = exported(ids).logits[..., : expected.shape[-1]]
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
        positions += ids.numel()
    weights = dict(original.named_parameters())
    identical = compare_weights(weights, dict(exported.named_parameters()))
    return Agreement(len(weights), identical, difference, largest, agreeing, positions)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--export", type=Path, required=True, help="folder of the export")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the numbers")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="absolute, for a logit (default: %(default)s)")
    options = parser.parse_args()
    huggingface.register()  # uses the package's copy of an export's modeling code; code in a folder is never run
    tokenizer = AutoTokenizer.from_pretrained(options.original, trust_remote_code=False)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    settings = {"dtype": torch.float32}
    original = AutoModelForCausalLM.from_pretrained(options.original, trust_remote_code=False, **settings)
    exported = AutoModelForImageTextToText.from_pretrained(options.export, trust_remote_code=False, **settings)
    found = compare(original.eval(), exported.eval(), rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    print(
        f"{found.identical} of {found.weights} weights are bit-identical; largest difference of a logit "
        f"{found.difference:.1e} (largest logit {found.largest:.1f}); {found.agreeing} of {found.positions} greedy "
        "tokens agree"
    )
    if not found.within(options.tolerance):
        sys.exit(f"The export in {options.export} differs from {options.original}.")


if __name__ == "__main__":
    main()
