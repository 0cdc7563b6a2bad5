# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding with the key-value cache, compared with passes over the full sequence for every token.

    torchrun --nproc-per-node 1 benchmarks/decoding.py --load CHECKPOINT [--prompt 256] [--new 256] [--rows 1] [--json]

The checkpoint's model decodes random prompts. At evenly spaced lengths of the sequence, one token is computed in both
ways, one after the other, alternating which comes first; between them the cache is filled by decoding. Without a cache
means one pass over the full sequence, which computes the last position's logits alone. The ratio is that of the total
times, the mean per token times the new tokens and the prompt's pass in both. Flags of pretrain_vlm.py (layout,
precision) may follow. On a GPU it has not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smar import runtime

runtime.install_or_exit()

import torch
import torch.distributed as dist
from megatron.core.inference.utils import InferenceMode
from tqdm import tqdm

from megatron_smar.commands.evaluate import load_model
from megatron_smar.evaluation.evaluator import Evaluator, text_sample
from megatron_smar.evaluation.generation import Row, Rows, decoding_settings


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line; returns the options, and the flags of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--prompt", type=int, default=256, help="Tokens of each prompt. Default: %(default)s.")
    parser.add_argument("--new", type=int, default=256, help="New tokens. Default: %(default)s.")
    parser.add_argument("--rows", type=int, default=1, help="Prompts decoded together. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=16, help="Lengths at which both are timed. Default: %(default)s.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options, flags = parser.parse_known_args()
    for name in ("prompt", "new", "rows", "pairs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not a number of 1 or more.")
    if options.pairs < 2 or options.new <= 2 * options.pairs:
        parser.error(
            f"--pairs {options.pairs} of --new {options.new}: give 2 pairs or more, and over twice as many new tokens."
        )
    options.questions, options.float32, options.batch_size = [], False, options.rows
    return options, flags


def seconds(work: Callable[[], object]) -> float:
    """Returns how long something takes, to the end of the device's work."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(evaluator: Evaluator, options: argparse.Namespace, vocabulary: int) -> dict[str, float]:
    """Times both ways, side by side."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(100, vocabulary) if i not in evaluator.placeholders])
    prompts = allowed[torch.randint(len(allowed), (options.rows, options.prompt), generator=generator)].tolist()
    rows = Rows(evaluator, [Row(text_sample(torch.tensor(ids)), options.new) for ids in prompts])
    every = options.new // options.pairs
    cached: list[float] = []
    full: list[float] = []
    with decoding_settings(evaluator.model), InferenceMode.active(), torch.no_grad():
        first = seconds(lambda: rows.take(rows.read_common_part()))
        for step in tqdm(range(1, options.new), desc="tokens", disable=dist.get_rank() > 0, mininterval=2):
            if step % every:
                rows.take(rows.read_next_tokens())
                continue
            # A random text may continue with a placeholder, which a prompt without pictures cannot have.
            texts = [
                Row(text_sample(torch.tensor([i if i not in evaluator.placeholders else 100 for i in row.ids])), 0)
                for row in rows.rows
            ]

            def decode() -> None:
                rows.take(rows.read_next_tokens())

            def recompute(texts: list[Row] = texts) -> None:
                Rows(evaluator, texts).read_common_part()

            for found, work in [(cached, decode), (full, recompute)][:: 1 if step % (2 * every) else -1]:
                found.append(seconds(work))
    with_cache, without = (first + sum(found) / len(found) * (options.new - 1) for found in (cached, full))
    return {
        "ratio": without / with_cache,
        "seconds_per_token_with_cache": sum(cached) / len(cached),
        "seconds_per_token_without": sum(full) / len(full),
        "seconds_of_the_prompt": first,
        "pairs": len(full),
    }


def main() -> None:
    """Loads the checkpoint, measures, and prints the result on rank 0."""
    options, flags = parse()
    evaluator, encoder = load_model(options, flags)
    result = measure(evaluator, options, len(encoder.continues_word()))
    if dist.get_rank() == 0:
        print(f"prompts of {options.prompt} tokens, {options.new} new ones, {options.rows} together")
        for name, value in result.items():
            print(f"  {name.replace('_', ' '):32} {value:.4g}")
        if options.json:
            print(json.dumps(vars(options) | result, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
