# SPDX-License-Identifier: Apache-2.0
"""The program behind tools/chat.py and `megatron-smar-chat`: asks a model one question and shows its answer.

A question may come with a picture. The model is an export, or a checkpoint, in which its run's arguments say the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smar import runtime


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="an export's folder, or a checkpoint's (--save)")
    parser.add_argument("question", help="the picture goes before it, unless <image> says where")
    parser.add_argument("--image", type=Path, help="file of a picture. Default: a question about text alone")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most of an answer. Default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: the most likely token each time")
    parser.add_argument("--seed", type=int, default=0, help="with --temperature. Default: %(default)s")
    parser.add_argument("--iteration", type=int, help="which of a checkpoint's. Default: the latest")
    parser.add_argument("--hf", type=Path, help="a checkpoint's config and tokenizer. Default: where its run read them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Asks; a user's mistake is one sentence."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {options.max_new_tokens} leaves no answer: give 1 or more.")
    if options.temperature < 0:
        parser.error(f"--temperature {options.temperature} is below 0: give 0 for the most likely tokens, or more.")
    if options.image is not None and not options.image.is_file():
        parser.error(f"--image {options.image} is not there: give the file of a picture.")
    runtime.install_or_exit("cpu")
    from megatron_smar.evaluation.chat import open_chat

    try:
        import torch

        chat = open_chat(options.source, options.iteration, options.hf)
        torch.manual_seed(options.seed)
        for piece in chat.answer(options.question, options.image, options.max_new_tokens, options.temperature):
            print(piece, end="", flush=True)
        print()
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
