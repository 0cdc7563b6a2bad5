# SPDX-License-Identifier: Apache-2.0
"""Asks a model one question and prints its answer (tools/chat.py, `megatron-smar-chat`).

A question may come with an image. The model is an export, or a checkpoint; a checkpoint stores its run's arguments, so
it needs no further flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smar import runtime


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="an export's folder, or a checkpoint's (--save)")
    parser.add_argument("question", help="the image is put before it, unless <image> in it says where")
    parser.add_argument("--image", type=Path, help="image file. Default: a question without an image")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer. Default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, always the most likely token")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampling, with --temperature. Default: %(default)s"
    )
    parser.add_argument("--iteration", type=int, help="step of the checkpoint to load. Default: the latest")
    parser.add_argument(
        "--hf", type=Path, help="folder with a checkpoint's config and tokenizer. Default: the run's own"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Asks the question; a user's mistake is reported in one sentence."""
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
