# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models in and out of the trainer's checkpoints; docs/checkpoints.md tells the whole.

A checkpoint is written in Megatron's torch_dist format, which has no layout: it loads under any number of tensor-,
pipeline-, expert- and data-parallel ranks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar import runtime

runtime.install()

import torch  # noqa: E402

from megatron_smar.arguments import CONNECTORS  # noqa: E402
from megatron_smar.checkpoint.composite import Connection  # noqa: E402
from megatron_smar.checkpoint.exporter import export_model  # noqa: E402
from megatron_smar.checkpoint.importer import write_model  # noqa: E402
from megatron_smar.checkpoint.sources import Source, read_composite, read_parts  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    imported = commands.add_parser("import", help="a Hugging Face model to a checkpoint for --load")
    _add_source(imported)
    exported = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    exported.add_argument("--load", type=Path, required=True, help="folder of the checkpoint")
    exported.add_argument("--iteration", type=int, help="which of its checkpoints. Default: the latest")
    exported.add_argument(
        "--hf",
        type=Path,
        required=True,
        help="folder with config and tokenizer: what was imported, or the import's hf/",
    )
    for command in (imported, exported):
        command.add_argument("--output", type=Path, required=True, help="new folder")
        command.add_argument("--dtype", choices=DTYPES, help="convert the weights. Default: as they are")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    whole = parser.add_argument_group("a composite model")
    whole.add_argument("--hf", type=Path, help="folder of an InternVL model, published or exported by this program")
    parts = parser.add_argument_group("or its parts, with a new connector")
    parts.add_argument("--language", type=Path, help="folder of a causal language model")
    parts.add_argument("--vision", type=Path, help="folder of a vision encoder, or of a model that has one")
    parts.add_argument(
        "--tokenizer-model", type=Path, help="tokenizer, to which image tokens are added. Default: that in --language"
    )
    default = Connection()
    parts.add_argument("--connector", choices=CONNECTORS, default=default.connector, help="default: %(default)s")
    parts.add_argument("--pixel-shuffle", type=float, default=default.pixel_shuffle, help="default: %(default)s")
    parts.add_argument("--vision-feature-layer", type=int, default=default.feature_layer, help="default: %(default)s")
    parts.add_argument("--vision-feature-scale", type=float, default=default.feature_scale, help="default: %(default)s")


def read_source(args: argparse.Namespace, scratch: Path) -> Source:
    """What --hf, or --language and --vision, name.

    Raises:
        ValueError: They name nothing that can be converted.
    """
    if args.hf is not None and args.language is None and args.vision is None:
        return read_composite(args.hf)
    if args.hf is not None or args.language is None or args.vision is None:
        raise ValueError("give either --hf, or both --language and --vision.")
    connection = Connection(args.connector, args.pixel_shuffle, args.vision_feature_layer, args.vision_feature_scale)
    return read_parts(args.language, args.vision, connection, args.tokenizer_model or args.language, scratch)


def main() -> None:
    """Runs one command; a user's mistake is one sentence."""
    parser = build_parser()
    args = parser.parse_args()
    try:
        if args.command == "import":
            with tempfile.TemporaryDirectory() as scratch:
                write_model(read_source(args, Path(scratch)), args.output, DTYPES.get(args.dtype))
        else:
            export_model(args.load, args.hf, args.output, args.iteration, DTYPES.get(args.dtype))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
