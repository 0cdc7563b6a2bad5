# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models in and out of the trainer's checkpoints; docs/checkpoints.md tells the whole.

A checkpoint is written in Megatron's torch_dist format, which has no layout: it loads under any number of tensor-,
pipeline-, expert- and data-parallel ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_smar import runtime

# Only `verify` runs a model; the others build it on the meta device, where a GPU is of no use.
runtime.install_or_exit(None if "verify" in sys.argv[1:2] else "cpu")

import torch
import torch.distributed as dist
from megatron.training import get_args

from megatron_smar.checkpoint.describe import describe
from megatron_smar.checkpoint.metadata import find_checkpoint, run_arguments
from megatron_smar.checkpoint.safetensors_io import read_folder
from megatron_smar.checkpoint.stored_flags import strategy_flags
from megatron_smar.config.build import vision_config
from megatron_smar.config.flags import CONNECTORS
from megatron_smar.config.run_file import saved_folder
from megatron_smar.conversion import composite, outcome
from megatron_smar.conversion.composite import Connection, load_composite
from megatron_smar.conversion.empty_model import as_argv
from megatron_smar.conversion.exporter import export_model, read_checkpoint
from megatron_smar.conversion.importer import write_model
from megatron_smar.conversion.reference import load_parts, load_whole, reference_logits
from megatron_smar.conversion.sources import CONNECTOR_SEED, Source, read_composite, read_parts
from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled
from megatron_smar.evaluation.verify import (
    Agreement,
    build_inputs,
    checkpoint_logits,
    compare,
)
from megatron_smar.modalities import Modalities
from megatron_smar.model.vision import tokens_per_tile
from megatron_smar.training.setup import start

FORMS = "give either --hf, or both --language and --vision."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    imported = commands.add_parser("import", help="a Hugging Face model to a checkpoint for --load")
    _add_source(imported)
    exported = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    place = exported.add_mutually_exclusive_group(required=True)
    place.add_argument("--load", type=Path, help="folder of the checkpoint")
    place.add_argument("--config", type=Path, help="or its run's run.yaml")
    exported.add_argument("--iteration", type=int, help="which of its checkpoints. Default: the latest")
    exported.add_argument(
        "--hf",
        type=Path,
        required=True,
        help="folder with config and tokenizer: what was imported, or the import's hf/",
    )
    exported.add_argument(
        "--no-processor",
        dest="processor",
        action="store_false",
        help="write no processor, chat template and generation config; tokenizer files are copied as they are",
    )
    upcycle = commands.add_parser(
        "upcycle", help="a dense model to a checkpoint of a mixture of experts that starts as it"
    )
    _add_source(upcycle)
    upcycle.add_argument("--load", type=Path, help="or a dense model's checkpoint, whose config is in --hf")
    _add_upcycling(upcycle)
    inspected = commands.add_parser("inspect", help="what a checkpoint holds, read from its table of contents alone")
    inspected.add_argument("load", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint")
    inspected.add_argument("--iteration", type=int, help="which of its checkpoints. Default: the latest")
    inspected.add_argument("--json", action="store_true", help="as one JSON object")
    verified = commands.add_parser(
        "verify",
        help="whether a checkpoint and a Hugging Face model have the same logits; exit status 1 where they differ",
        description="Further flags are Megatron's (layout, --bf16 ...); several ranks are started by torchrun.",
    )
    verified.add_argument("--hf", type=Path, help="folder of the model, with its weights")
    verified.add_argument("--language", type=Path, help="or of the language model that was imported")
    verified.add_argument("--vision", type=Path, help="with the vision encoder's; the connector is the checkpoint's")
    verified.add_argument("--load", type=Path, required=True, help="folder of the checkpoint")
    verified.add_argument("--tolerance", type=float, default=1e-4, help="of a logit, absolute. Default: %(default)s")
    verified.add_argument("--text", nargs="+", default=[], help="texts to compare on. Default: one of its own")
    verified.add_argument("--image", nargs="+", type=Path, default=[], help="pictures. Default: one of matplotlib's")
    for command in (imported, upcycle, exported):
        command.add_argument("--output", type=Path, required=True, help="new folder")
        command.add_argument("--dtype", choices=DTYPES, help="convert the weights. Default: as they are")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    whole = parser.add_argument_group("a composite model")
    whole.add_argument("--hf", type=Path, help="folder of an InternVL or VITA model, as published, or of an export")
    parts = parser.add_argument_group("or its parts, with a new connector")
    parts.add_argument("--language", type=Path, help="folder of a causal language model")
    parts.add_argument(
        "--vision",
        type=Path,
        help="folder of a vision encoder, or of a model that has one; with VITA as --hf, its InternViT",
    )
    parts.add_argument(
        "--tokenizer-model", type=Path, help="tokenizer, to which image tokens are added. Default: that in --language"
    )
    default = Connection()
    parts.add_argument("--connector", choices=CONNECTORS, default=default.connector, help="default: %(default)s")
    parts.add_argument("--pixel-shuffle", type=float, default=default.pixel_shuffle, help="default: %(default)s")
    parts.add_argument("--vision-feature-layer", type=int, default=default.feature_layer, help="default: %(default)s")
    parts.add_argument("--vision-feature-scale", type=float, default=default.feature_scale, help="default: %(default)s")
    parser.add_argument(
        "--image-modalities",
        nargs="+",
        metavar="NAME",
        default=list(Modalities().images),
        help="kinds of images that will be trained on, as for pretrain_vlm.py; the tokenizer must have their "
        "placeholders (tools/data/add_tokens.py --also). Default: vision",
    )
    parser.add_argument(
        "--seed", type=int, default=CONNECTOR_SEED, help="of weights that are drawn. Default: %(default)s"
    )


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("the mixture"), UpcyclingConfig()
    numbers: dict[str, tuple[type, object, str]] = {
        "num-experts": (int, default.num_experts, "experts per layer that has some"),
        "moe-router-topk": (int, default.topk, "how many a token goes to"),
        "every": (int, default.every, "every n-th layer gets experts, from the first on"),
        "router-init-std": (float, default.router_init_std, "standard deviation of the new routers' weights"),
        "noise": (float, default.noise, "relative standard deviation of noise on the experts' weights"),
    }
    for name, (kind, value, text) in numbers.items():
        group.add_argument(f"--{name}", type=kind, default=value, help=f"{text}. Default: %(default)s")


def read_source(args: argparse.Namespace, scratch: Path) -> Source:
    """What --hf, or --language and --vision, name.

    Raises:
        ValueError: They name nothing that can be converted.
    """
    load = getattr(args, "load", None)
    if args.hf is not None and args.language is None and (load is None or args.vision is None):
        return read_composite(args.hf, args.vision, scratch) if load is None else read_checkpoint(load, args.hf)
    if args.hf is not None or args.language is None or args.vision is None:
        raise ValueError(FORMS)
    if load is not None:
        raise ValueError("--load goes with --hf, the folder that has the checkpoint's config; leave --language out.")
    connection = Connection(args.connector, args.pixel_shuffle, args.vision_feature_layer, args.vision_feature_scale)
    tokenizer = args.tokenizer_model or args.language
    return read_parts(args.language, args.vision, connection, tokenizer, scratch, args.seed)


def sources_of(args: argparse.Namespace) -> list[str]:
    """Flags under which `verify` compares an import with what it was made of; none where they are not to be equal."""
    noise: float = getattr(args, "noise", 0.0)
    if args.dtype is not None or noise:
        return []
    if args.hf is None:
        return ["--language", str(args.language), "--vision", str(args.vision)]
    comparable = getattr(args, "load", None) is None and args.vision is None
    is_original = composite.read_content(args.hf).get("model_type") in composite.ORIGINAL_TYPES
    return ["--hf", str(args.hf)] if comparable and not is_original else []


def upcycling_config(args: argparse.Namespace) -> UpcyclingConfig:
    """The flags of upcycling."""
    return UpcyclingConfig(
        args.num_experts, args.moe_router_topk, args.every, args.router_init_std, args.noise, args.seed
    )


def verify(options: argparse.Namespace, flags: list[str]) -> bool:
    """Compares a checkpoint with a Hugging Face model, and prints how far they agree.

    Returns:
        Whether they do, on every rank.
    """
    parts = [options.language, options.vision]
    if (options.hf is None) != all(parts) or (options.hf is not None and any(parts)):
        raise ValueError(FORMS)
    find_checkpoint(options.load)
    hf = options.hf or options.load / "hf"
    if options.hf is None and not hf.is_dir():
        raise ValueError(
            f"{options.load} has no hf/, as an import of --language and --vision leaves it; export it, and give the "
            "export as --hf."
        )
    config = load_composite(hf)
    for folder in filter(None, [options.hf, *parts]):
        read_folder(folder)  # one without weights is named before anything is built
    written = options.load / "flags.txt"  # import and upcycle leave the model's flags there
    model_flags = written.read_text().split() if written.is_file() else as_argv(composite.flags(config))
    vocabulary = ["--tokenizer-type", "NullTokenizer", "--vocab-size", config.text_config.vocab_size]
    fixed = "--micro-batch-size 1 --global-batch-size 1 --skip-train --no-load-optim --no-load-rng --finetune".split()
    given = ["--vision-model", hf, "--load", options.load, "--exit-on-missing-checkpoint"]
    length = ["--seq-length", config.text_config.max_position_embeddings]
    argv = [*model_flags, *vocabulary, *fixed, *given, *length, *flags]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)  # torchrun sets them where there are several
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all its arguments
        model, _, _ = start([str(word) for word in argv], _stored_strategy(options.load, flags))
    args = get_args()
    ids, tiles = build_inputs(hf, config, options.text, options.image, args.tensor_model_parallel_size)
    ours = checkpoint_logits(model, ids, tiles, config.image_token_id, tokens_per_tile(vision_config(args)))
    found: list[Agreement | None] = [None]
    if dist.get_rank() == 0:
        whole = (
            load_parts(options.load, options.language, options.vision, args.params_dtype)
            if options.hf is None
            else load_whole(options.hf, args.params_dtype)
        )
        agreement = compare(reference_logits(whole, hf, ids, tiles, runtime.device()), ours)
        print(agreement.table(options.tolerance), flush=True)
        found = [agreement]
    dist.broadcast_object_list(found)
    dist.destroy_process_group()
    assert found[0] is not None
    return found[0].within(options.tolerance)


def _stored_strategy(load: Path, flags: list[str]) -> dict[str, Any]:
    """The routing strategy's settings of the checkpoint that Megatron will load, unless flags choose a strategy."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--modality-routing")
    given, _ = parser.parse_known_args(flags)
    return {} if given.modality_routing else strategy_flags(run_arguments(load, given.ckpt_step))


def main() -> None:
    """Runs one command; a user's mistake is one sentence."""
    parser = build_parser()
    args, flags = parser.parse_known_args()
    if flags and args.command != "verify":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if args.command == "verify":
            sys.exit(0 if verify(args, flags) else 1)
        if args.command == "inspect":
            description = describe(args.load, args.iteration)
            print(json.dumps(description.as_json()) if args.json else description.table())
        elif args.command in ("import", "upcycle"):
            with tempfile.TemporaryDirectory() as scratch:
                source = read_source(args, Path(scratch))
                if args.command == "upcycle":
                    source = upcycled(source, upcycling_config(args))
                images = Modalities(tuple(args.image_modalities)).images
                if len(images) > 1:
                    source = replace(source, flags=source.flags | {"image-modalities": images})
                written = write_model(source, args.output, DTYPES.get(args.dtype))
            print(outcome.of_import(args.output, written, sources_of(args)))
        else:
            dtype, load = DTYPES.get(args.dtype), saved_folder(args.config) if args.config else args.load
            written = export_model(load, args.hf, args.output, args.iteration, dtype, args.processor)
            print(outcome.of_export(args.output, written, load))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
