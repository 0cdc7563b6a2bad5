# SPDX-License-Identifier: Apache-2.0
"""Add the image tokens to a SentencePiece model, or to the folder of a Hugging Face tokenizer, after the last id.

Existing ids do not change; tokens that already exist keep their ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.data.tokens import IMAGE_TOKENS, add_tokens


def main() -> None:
    """Runs `add_tokens` as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", help="SentencePiece model, e.g. Mixtral's tokenizer.model, or folder of a Hugging Face tokenizer"
    )
    parser.add_argument("destination", help="file or folder to write, to be given as --tokenizer-model")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="TOKEN", help="further tokens, e.g. '<|im_start|>' '<|im_end|>'"
    )
    args = parser.parse_args()
    try:
        add_tokens(args.source, args.destination, [*IMAGE_TOKENS, *args.also])
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
