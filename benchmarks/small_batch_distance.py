# SPDX-License-Identifier: Apache-2.0
"""How far the MRD distance of a small batch is from that of very many tokens of the same kind.

    python benchmarks/small_batch_distance.py [--experts 8:2 64:8] [--tokens 16 64 256 1024] [--batches 40] [--json]

Two modalities of equally many tokens are routed to K of E experts by logits that are a normal vector of the modality
plus normal noise of the token. The noise is independent, so tokens that resemble each other, as those of one image do,
count as fewer. Each entry is the mean distance over batches and models minus that of 65,536 tokens per modality.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megatron_smar.routing import layer_distance, routing_statistics

MANY = 65_536
MODELS = 8  # pairs of modalities' mean logits
SPREAD = 0.7  # standard deviation of a modality's mean logits, in standard deviations of a token's noise


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["8:2", "64:8", "64:2"], metavar="E:K", help="Layers.")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024, 4096], help="Per modality.")
    parser.add_argument("--batches", type=int, default=40, help="Batches per model. Default: %(default)s.")
    parser.add_argument("--eps", type=float, default=1e-6, help="--smar-eps. Default: %(default)s.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    for layer in options.experts:
        experts, _, top_k = layer.partition(":")
        if not (experts.isdigit() and top_k.isdigit() and 0 < int(top_k) <= int(experts)):
            parser.error(f"--experts {layer} is not E:K with K of at most E experts per token, such as 8:2.")
    for name, value in [("--tokens", min(options.tokens)), ("--batches", options.batches)]:
        if value < 1:
            parser.error(f"{name} {value} is not a number of 1 or more.")
    return options


def distance(means: Tensor, tokens: int, top_k: int, eps: float, generator: torch.Generator) -> float:
    """Returns the distance of a batch.

    Args:
        means: The modalities' mean logits, [2, E].
        tokens: Tokens of each modality.
        top_k: K, experts per token.
        eps: Smoothing of the distributions.
        generator: Source of the tokens' noise.
    """
    ids = torch.arange(2).repeat_interleave(tokens)
    logits = means[ids] + torch.randn(len(ids), means.shape[1], generator=generator, dtype=torch.float64)
    values, chosen = logits.topk(top_k, dim=1)
    weights = torch.zeros_like(logits).scatter(1, chosen, values.softmax(dim=1))
    return float(layer_distance(routing_statistics(weights, weights > 0, ids, 2), top_k, eps)[0])


def excess(experts: int, top_k: int, options: argparse.Namespace) -> dict[str, float]:
    """Returns the distance of many tokens (`many`), and by number of tokens what a batch's mean exceeds it by."""
    generator = torch.Generator().manual_seed(0)
    models = [SPREAD * torch.randn(2, experts, generator=generator, dtype=torch.float64) for _ in range(MODELS)]
    many = [distance(means, MANY, top_k, options.eps, generator) for means in models]
    row = {"many": sum(many) / MODELS}
    for tokens in options.tokens:
        batches = [distance(m, tokens, top_k, options.eps, generator) for m in models for _ in range(options.batches)]
        row[str(tokens)] = sum(batches) / len(batches) - row["many"]
    return row


def main() -> None:
    """Prints one row per layer."""
    options = parse()
    rows = {}
    for layer in options.experts:
        experts, top_k = layer.split(":")
        rows[layer] = excess(int(experts), int(top_k), options)
    print(f"{'experts E:K':12}{'distance':>10}" + "".join(f"{f'+ at {tokens}':>12}" for tokens in options.tokens))
    for layer, row in rows.items():
        print(f"{layer:12}{row['many']:10.2f}" + "".join(f"{row[str(tokens)]:12.2f}" for tokens in options.tokens))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
