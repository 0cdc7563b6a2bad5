# SPDX-License-Identifier: Apache-2.0
"""Converts Hugging Face models to checkpoints of the trainer and back; docs/checkpoints.md describes all commands.

A checkpoint is written in Megatron's torch_dist format, which does not depend on a parallel layout: it loads under any
number of tensor-, pipeline-, expert- and data-parallel ranks.
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

# Only `verify` runs a model; the other commands build it on the meta device and need no GPU.
runtime.install_or_exit(None if "verify" in sys.argv[1:2] else "cpu")

import torch
import torch.distributed as dist
from megatron.training import get_args

from megatron_smar.checkpoint.describe import describe
from megatron_smar.checkpoint.location import LOADER_STATES, problem_of
from megatron_smar.checkpoint.metadata import find_checkpoint, run_arguments
from megatron_smar.checkpoint.safetensors_io import read_folder
from megatron_smar.checkpoint.stored_flags import strategy_flags
from megatron_smar.checkpoint.valid import verify_content
from megatron_smar.config.build import get_run_config
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
from megatron_smar.reliability.manifest import Verification
from megatron_smar.training.setup import start

FORMS = "give either --hf, or both --language and --vision."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    imported = commands.add_parser("import", help="write a Hugging Face model as a checkpoint for --load")
    _add_source(imported)
    exported = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    place = exported.add_mutually_exclusive_group(required=True)
    place.add_argument("--load", type=Path, help="folder of the checkpoint")
    place.add_argument("--config", type=Path, help="or the run.yaml of its run")
    exported.add_argument("--iteration", type=int, help="step of the checkpoint to read. Default: the latest")
    exported.add_argument(
        "--hf",
        type=Path,
        required=True,
        help="folder with config and tokenizer: the imported model's, or the import's hf/",
    )
    exported.add_argument(
        "--no-processor",
        dest="processor",
        action="store_false",
        help="write no processor, chat template and generation config; tokenizer files are copied unchanged",
    )
    upcycle = commands.add_parser(
        "upcycle", help="write a dense model as a mixture of experts that computes the same at the start"
    )
    _add_source(upcycle)
    upcycle.add_argument("--load", type=Path, help="or a dense model's checkpoint, whose config is in --hf")
    _add_upcycling(upcycle)
    inspected = commands.add_parser("inspect", help="show what a checkpoint holds, from its table of contents only")
    inspected.add_argument("load", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint")
    inspected.add_argument("--iteration", type=int, help="step of the checkpoint to read. Default: the latest")
    inspected.add_argument("--json", action="store_true", help="print one JSON object")
    inspected.add_argument(
        "--verify",
        nargs="?",
        choices=["full", "sampled", "none"],
        const="full",
        help="compare the files with the checkpoint's manifest: full (the default) every byte, sampled a few blocks of "
        "each file, none sizes only; exit status 1 if they differ",
    )
    verified = commands.add_parser(
        "verify",
        help="compare the logits of a checkpoint and a Hugging Face model; exit status 1 if they differ",
        description="Other flags go to Megatron (parallel sizes, --bf16, ...); torchrun starts several ranks.",
    )
    verified.add_argument("--hf", type=Path, help="folder of the model, with its weights")
    verified.add_argument("--language", type=Path, help="or folder of the language model that was imported")
    verified.add_argument(
        "--vision", type=Path, help="with folder of the vision encoder; the connector is the checkpoint's"
    )
    verified.add_argument("--load", type=Path, required=True, help="folder of the checkpoint")
    verified.add_argument("--tolerance", type=float, default=1e-4, help="absolute, for a logit. Default: %(default)s")
    verified.add_argument("--text", nargs="+", default=[], help="texts to compare on. Default: a built-in sentence")
    verified.add_argument("--image", nargs="+", type=Path, default=[], help="image files. Default: one of matplotlib's")
    for command in (imported, upcycle, exported):
        command.add_argument("--output", type=Path, required=True, help="new folder")
        command.add_argument("--dtype", choices=DTYPES, help="data type to convert the weights to. Default: unchanged")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    composite_model = parser.add_argument_group("a composite model")
    composite_model.add_argument(
        "--hf", type=Path, help="folder of an InternVL or VITA model, as published, or of an export"
    )
    parts = parser.add_argument_group("or its parts, with a new connector")
    parts.add_argument("--language", type=Path, help="folder of a causal language model")
    parts.add_argument(
        "--vision",
        type=Path,
        help="folder of a vision encoder, or of a model with a vision encoder; with VITA as --hf, its InternViT",
    )
    parts.add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer, to which image tokens are added. Default: the one in --language",
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
        help="kinds of images to train on, as for pretrain_vlm.py; the tokenizer must have their "
        "placeholders (tools/data/add_tokens.py --also). Default: vision",
    )
    parser.add_argument("--seed", type=int, default=CONNECTOR_SEED, help="seed of new weights. Default: %(default)s")


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("the mixture"), UpcyclingConfig()
    numbers: dict[str, tuple[type, object, str]] = {
        "num-experts": (int, default.num_experts, "experts per MoE layer"),
        "moe-router-topk": (int, default.topk, "experts that each token is routed to"),
        "every": (int, default.every, "every n-th layer becomes an MoE layer, from the first on"),
        "router-init-std": (float, default.router_init_std, "standard deviation of the new routers' weights"),
        "noise": (float, default.noise, "relative standard deviation of the noise added to the experts' weights"),
    }
    for name, (kind, value, text) in numbers.items():
        group.add_argument(f"--{name}", type=kind, default=value, help=f"{text}. Default: %(default)s")


def read_source(args: argparse.Namespace, scratch: Path) -> Source:
    """Reads the model that --hf, or --language and --vision, name.

    Raises:
        ValueError: The flags do not name a model that can be converted.
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
    """Returns the flags with which `verify` compares an import with its source; empty where they need not be equal."""
    noise: float = getattr(args, "noise", 0.0)
    if args.dtype is not None or noise:
        return []
    if args.hf is None:
        return ["--language", str(args.language), "--vision", str(args.vision)]
    comparable = getattr(args, "load", None) is None and args.vision is None
    is_original = composite.read_content(args.hf).get("model_type") in composite.ORIGINAL_TYPES
    return ["--hf", str(args.hf)] if comparable and not is_original else []


def upcycling_config(args: argparse.Namespace) -> UpcyclingConfig:
    """Returns the configuration that the upcycling flags describe."""
    return UpcyclingConfig(
        args.num_experts, args.moe_router_topk, args.every, args.router_init_std, args.noise, args.seed
    )


def verify(options: argparse.Namespace, flags: list[str]) -> bool:
    """Compares a checkpoint with a Hugging Face model, and prints how closely they agree.

    Returns:
        Whether they agree, on every rank.
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
        read_folder(folder)  # refuses a folder without weights before anything is built
    flags_file = options.load / "flags.txt"  # import and upcycle write the model's flags there
    model_flags = flags_file.read_text().split() if flags_file.is_file() else as_argv(composite.flags(config))
    vocabulary = ["--tokenizer-type", "NullTokenizer", "--vocab-size", config.text_config.vocab_size]
    fixed = "--micro-batch-size 1 --global-batch-size 1 --skip-train --no-load-optim --no-load-rng --finetune".split()
    given = ["--vision-model", hf, "--load", options.load, "--exit-on-missing-checkpoint"]
    length = ["--seq-length", config.text_config.max_position_embeddings]
    argv = [*model_flags, *vocabulary, *fixed, *given, *length, *flags]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)  # torchrun sets them for several ranks
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all its arguments
        model, _, _ = start([str(word) for word in argv], _stored_strategy(options.load, flags))
    args = get_args()
    ids, tiles = build_inputs(hf, config, options.text, options.image, args.tensor_model_parallel_size)
    logits = checkpoint_logits(model, ids, tiles, config.image_token_id, get_run_config().tokens_per_tile)
    found: list[Agreement | None] = [None]
    if dist.get_rank() == 0:
        reference = (
            load_parts(options.load, options.language, options.vision, args.params_dtype)
            if options.hf is None
            else load_whole(options.hf, args.params_dtype)
        )
        agreement = compare(reference_logits(reference, hf, ids, tiles, runtime.device()), logits)
        print(agreement.table(options.tolerance), flush=True)
        found = [agreement]
    dist.broadcast_object_list(found)
    dist.destroy_process_group()
    assert found[0] is not None
    return found[0].within(options.tolerance)


def _stored_strategy(load: Path, flags: list[str]) -> dict[str, Any]:
    """Returns the stored routing strategy's settings of the checkpoint to load, unless flags choose a strategy."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--modality-routing")
    given, _ = parser.parse_known_args(flags)
    return {} if given.modality_routing else strategy_flags(run_arguments(load, given.ckpt_step))


def main() -> None:
    """Runs one command; a user's mistake is reported in one sentence."""
    parser = build_parser()
    args, flags = parser.parse_known_args()
    if flags and args.command != "verify":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if args.command == "verify":
            sys.exit(0 if verify(args, flags) else 1)
        if args.command == "inspect" and args.verify:
            print(verify_files(find_checkpoint(args.load, args.iteration), args.verify))
        elif args.command == "inspect":
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


def verify_files(checkpoint: Path, how: Verification) -> str:
    """Returns a sentence on the files of an undamaged checkpoint.

    Raises:
        ValueError: The checkpoint is damaged; the message names every file.
    """
    loader = checkpoint.parent / LOADER_STATES / checkpoint.name
    if (problem := problem_of(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} is damaged: {problem}.")
    problems, outcome = verify_content(checkpoint, how, loader if loader.is_dir() else None)
    if problems:
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(problems)}.")
    return f"{outcome}."


if __name__ == "__main__":
    main()
