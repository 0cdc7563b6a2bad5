# SPDX-License-Identifier: Apache-2.0
r"""Plans parallel layouts: which fit on a cluster, how long a step takes in each, and why the others lose.

    python tools/plan.py layouts examples/mixtral_8x7b_internvit --gpus 64 --cluster h100 --html plan.html
    python tools/plan.py layouts runs/start --gpus 256 --cluster b200 -- --freeze vision --modality-routing smoes
    python tools/plan.py layouts MODEL --gpus 64 --only tensor=1 pipeline=1 recompute=full -- --freeze vision
    python tools/plan.py published
    python tools/plan.py statistics

MODEL is the folder of a recipe, of a converted checkpoint (what `convert.py import` or `upcycle` wrote), or of a
Hugging Face model of vision encoder and language model. Flags of the trainer after the -- say what is frozen and how
tokens are routed; those of a recipe's last stage come before them.

Memory is that of Megatron's buffers, exactly, and of what the layers keep; communication is exact for an even routing;
time has one value that is adjusted to measurements, the cluster's --efficiency. docs/planning.md says how each was
checked and how far published runs are from their plans. Nothing of it was measured on a GPU by this project.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_smar import runtime

runtime.install_or_exit("cpu")

from tqdm import tqdm
from transformers import PretrainedConfig

from megatron_smar.conversion.architectures import UnsupportedError
from megatron_smar.conversion.composite import Connection, combine, flags, load_config
from megatron_smar.conversion.empty_model import as_argv
from megatron_smar.conversion.model_shape import describe_shape
from megatron_smar.conversion.upcycle import UpcyclingConfig, mixture_flags
from megatron_smar.launch.command import split
from megatron_smar.planning import published, statistics
from megatron_smar.planning.cluster import GIB, PRESETS, Cluster
from megatron_smar.planning.duration import duration
from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.memory import Place, checkpoint_bytes, memory, saving_bytes
from megatron_smar.planning.search import Plan, Request, search
from megatron_smar.planning.shape import ModelShape
from megatron_smar.report.numbers import aligned
from megatron_smar.report.plan_page import TITLES, page, row_of

# Flags of a recipe's last stage that change what the model's shape describes.
RECIPE_FLAGS = ("freeze", "modality-routing")
# Names for --only -> the layout's attribute.
ATTRIBUTES = {
    "tensor": "tensor",
    "pipeline": "pipeline",
    "chunks": "chunks",
    "context": "context",
    "expert": "expert",
    "expert-tensor": "expert_tensor",
    "micro-batch": "micro_batch",
    "offload": "offload",
    "recompute": "recomputation",
}


def recipe_config(folder: Path, given: Sequence[str] = ()) -> tuple[PretrainedConfig, list[str]]:
    """Returns the published model of a recipe in examples/, and the trainer's flags that its config does not give.

    Args:
        folder: The recipe's folder.
        given: Flags of the run.
    """
    architecture = _architectures(folder.parent)[folder.name]
    text = architecture.language
    connection = Connection(pixel_shuffle=1.0, feature_layer=-2) if architecture.upcycled else Connection()
    config = combine(text, architecture.vision, connection, text.vocab_size - 1, text.vocab_size)
    mixture: list[str] = []
    if architecture.upcycled:
        experts, chosen, every = architecture.upcycled
        mixture = as_argv(mixture_flags(flags(config), UpcyclingConfig(experts, chosen, every)))
    return config, [*mixture, *given]


def _architectures(examples: Path) -> dict[str, Any]:
    """Returns the published models of the recipes, from the file that describes them."""
    spec = importlib.util.spec_from_file_location("architectures", examples / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module  # its dataclasses look up their module
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.ARCHITECTURES
    return found


def recipe_flags(folder: Path) -> list[str]:
    """Returns what a recipe's last stage freezes and how it routes."""
    stages = sorted(folder.glob("stage*.yaml"))
    content = yaml.safe_load(stages[-1].read_text(encoding="utf-8")) if stages else {}
    settings = {name: value for group in content.values() if isinstance(group, dict) for name, value in group.items()}
    return as_argv({name: settings[name] for name in RECIPE_FLAGS if name in settings})


def model_of(folder: Path, given: Sequence[str]) -> ModelShape:
    """Returns the shape of the model in a folder.

    Args:
        folder: Of a recipe, a converted checkpoint, or a Hugging Face model.
        given: Flags of the trainer.

    Raises:
        ValueError: The folder has no model, or the trainer refuses it or the flags.
    """
    if (folder.resolve().parent / "architectures.py").is_file():
        return describe_shape(*recipe_config(folder.resolve(), [*recipe_flags(folder), *given]))
    converted = folder / "hf" if (folder / "flags.txt").is_file() else folder
    if not (converted / "config.json").is_file():
        raise ValueError(
            f"{folder} has no model: give the folder of a recipe in examples/, of a converted checkpoint with "
            "flags.txt and hf/, or of a Hugging Face model with config.json."
        )
    stored = (folder / "flags.txt").read_text().split() if converted is not folder else []
    return describe_shape(load_config(converted), [*stored, *given])


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Returns the preset with the values that were given."""
    names = [field.name for field in dataclasses.fields(Cluster) if field.name != "name"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(PRESETS[options.cluster], **given)


def wanted(words: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a layout's attributes that --only asks for.

    Raises:
        ValueError: A word is not of the form NAME=VALUE, or the layout has no such attribute.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in ATTRIBUTES or not value:
            raise ValueError(f"--only {word}: give NAME=VALUE, with NAME one of {', '.join(ATTRIBUTES)}.")
        if name == "recompute":
            if value not in ("none", "selective", "full"):
                raise ValueError(f"--only {word}: recompute is none, selective or full.")
            found[ATTRIBUTES[name]] = None if value == "none" else value
        elif name == "offload":
            found[ATTRIBUTES[name]] = value == "true"
        elif not value.isdigit():
            raise ValueError(f"--only {word}: {value} is not a number.")
        else:
            found[ATTRIBUTES[name]] = int(value)
    return found


def matches(layout: Layout, values: dict[str, Any]) -> bool:
    """Whether a layout has the wanted values."""
    return all(
        (layout.recomputation.granularity if name == "recomputation" else getattr(layout, name)) == value
        for name, value in values.items()
    )


def request_of(options: argparse.Namespace, given: Sequence[str]) -> Request:
    """Returns what the command line asks to plan."""
    shape = model_of(options.model, given)
    tokens = options.tiles * shape.vision.tokens + options.samples_per_row * options.text_tokens
    batch = Batch(
        options.seq_length,
        options.global_batch_size,
        options.samples_per_row,
        options.tiles,
        options.most_tiles,
        min(1.0, tokens / options.seq_length),
        options.predicted,
    )
    return Request(shape, batch, cluster_of(options), options.gpus, options.imbalance, host_memory=options.host_memory)


def as_row(plan: Plan) -> dict[str, Any]:
    """Returns a plan for JSON: bytes, seconds, and the flags to paste."""
    return {
        "layout": str(plan.layout),
        "fits": plan.fits,
        "seconds": plan.seconds,
        "tokens_per_second_per_gpu": plan.tokens,
        "model_tflops_per_gpu": plan.tflops,
        "memory": plan.memory.by_part() | {"total": plan.memory.device, "host": plan.memory.host},
        "time": plan.duration.by_part(),
        "reason": plan.reason,
    }


def plan_layouts(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Plans, and prints the table; writes the page."""
    request, values = request_of(options, given), wanted(options.only)
    watch = functools.partial(tqdm, desc="layouts", disable=None, leave=False)
    plans = search(request, options.best, watch, lambda layout: matches(layout, values))
    rows = [TITLES, *(row_of(plan) for plan in plans)]
    print(f"{request.shape.size / 1e9:.1f} billion parameters, {request.gpus} x {request.cluster.name}")
    print("\n".join(aligned(rows, (0, 5))))
    best, chosen = plans[0], plans[0].layout.flags(request.shape, request.batch)
    if not best.fits:
        need, has = best.memory.device / GIB, request.cluster.memory
        print(f"\nNothing fits: the smallest layout needs {need:.0f} GiB of {has:.0f}. Take more GPUs, or freeze more.")
    saving = saving_bytes(request.shape, best.layout)
    host, checkpoint = best.memory.host / 1e9, checkpoint_bytes(request.shape) / 1e9
    print(f"\nThe first layout: {host:.0f} GB of the host's memory per GPU, {saving / 1e9:.0f} GB while it saves or")
    print(f"resumes; a checkpoint of {checkpoint:.0f} GB.")
    print(f"\n{' '.join(chosen)}")
    if options.html:
        options.html.write_text(page(request, plans), encoding="utf-8")
        print(f"\n{options.html}: memory and time by part")
    if options.json:
        sizes = {"checkpoint": checkpoint_bytes(request.shape), "saving": saving}
        rows_of = [as_row(plan) for plan in plans]
        print(json.dumps({"gpus": request.gpus, "plans": rows_of, "flags": chosen, **sizes}))


def compare_published(options: argparse.Namespace) -> None:
    """Prints published runs beside their plans."""
    rows = [("run", "step s", "plan s", "error %", "peak GiB", "plan GiB", "error %")]
    results = []
    for run in published.RUNS:
        stages = [memory(run.shape, run.layout, run.batch, Place(stage)) for stage in range(run.layout.pipeline)]
        fullest = max(stages, key=lambda one: one.peak)
        cluster = PRESETS["h100"]
        tflops = cluster.tflops * (2 if run.fp8 else 1)
        cluster = dataclasses.replace(cluster, efficiency=options.efficiency or cluster.efficiency, tflops=tflops)
        time = duration(run.shape, run.layout, run.batch, cluster, fullest, strategy="none").total
        step = run.batch.rows * run.batch.sequence / run.tokens / run.layout.gpus if run.tokens else None
        peak = fullest.peak / GIB
        rows.append((run.name, *_beside(step, time, ".2f"), *_beside(run.peak, peak, ".1f")))
        result = {"run": run.name, "source": run.source, "step": step, "peak": run.peak}
        results.append(result | {"planned_step": step and time, "planned_peak": run.peak and peak})
    print("\n".join(aligned(rows, (0,))))
    if options.json:
        print(json.dumps(results))


def _beside(known: float | None, planned: float, form: str) -> tuple[str, str, str]:
    """Returns a published value, its plan, and the plan's error in percent."""
    if known is None:
        return "-", "-", "-"
    return f"{known:{form}}", f"{planned:{form}}", f"{100 * (planned / known - 1):+.0f}"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    layouts = commands.add_parser("layouts", help="the fastest layouts of a model that fit", allow_abbrev=False)
    layouts.add_argument("model", type=Path, metavar="MODEL", help="folder of a recipe, a checkpoint or a model")
    layouts.add_argument("--gpus", type=int, required=True)
    layouts.add_argument("--best", type=int, default=10, help="layouts to show (default: %(default)s)")
    layouts.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE", help=f"of {', '.join(ATTRIBUTES)}")
    _add_batch(layouts)
    _add_cluster(layouts)
    layouts.add_argument("--html", type=Path, metavar="FILE", help="also a page with charts")
    layouts.add_argument("--json", action="store_true", help="one JSON object as the last line")
    runs = commands.add_parser("published", help="published runs beside their plans", allow_abbrev=False)
    runs.add_argument("--efficiency", type=float, help="default: the preset's")
    runs.add_argument("--json", action="store_true", help="a JSON list as the last line")
    tables = commands.add_parser("statistics", help="communication of the routing statistics", allow_abbrev=False)
    default = statistics.Setup
    tables.add_argument("--tokens", type=int, default=default.tokens, help="per rank and micro-batch (%(default)s)")
    tables.add_argument(
        "--expert-parallel", type=int, default=default.expert_parallel, help="ranks of a layer's experts (%(default)s)"
    )
    tables.add_argument("--micro-batches", type=int, default=default.micro_batches, help="per step (%(default)s)")
    tables.add_argument("--tflops", type=float, default=default.tflops, help="assumed speed in the experts")
    return parser


def _add_batch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batch")
    group.add_argument("--seq-length", type=int, default=4096, help="default: %(default)s")
    group.add_argument("--global-batch-size", type=int, default=256, help="rows of a step (default: %(default)s)")
    group.add_argument("--samples-per-row", type=float, default=1, help="above 1 with packing (default: %(default)s)")
    group.add_argument("--tiles", type=float, default=8, help="of a row, mean (default: %(default)s)")
    group.add_argument("--most-tiles", type=float, default=13, help="of the fullest row (default: %(default)s)")
    group.add_argument(
        "--text-tokens", type=float, default=250, help="of a sample, mean; the rest of a row is padding (%(default)s)"
    )
    group.add_argument(
        "--predicted", type=float, default=1, help="share whose loss counts, which have logits (default: %(default)s)"
    )
    group.add_argument(
        "--imbalance",
        type=float,
        default=1.5,
        help="tokens of the fullest experts, of an even share among those of the same modalities (%(default)s)",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster; bandwidths are those of one GPU in one direction")
    group.add_argument("--cluster", choices=PRESETS, default="h100", help="preset (default: %(default)s)")
    for name, meaning in (
        ("memory", "GiB of a GPU"),
        ("tflops", "peak in bf16"),
        ("memory-gbs", "of its memory, GB/s"),
        ("node-gbs", "within a node, GB/s"),
        ("network-gbs", "between nodes, GB/s"),
        ("latency", "of a message, seconds"),
        ("efficiency", "share of these speeds that training reaches"),
    ):
        group.add_argument(f"--{name}", type=float, help=meaning)
    group.add_argument("--per-node", type=int, help="GPUs of a node")
    group.add_argument("--host-memory", type=float, default=128, help="GiB of the host per GPU (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command."""
    own, given = split(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    options: Any = parser.parse_args(own)
    try:
        if options.command == "layouts":
            plan_layouts(options, given)
        elif options.command == "published":
            compare_published(options)
        else:
            names = [field.name for field in dataclasses.fields(statistics.Setup) if hasattr(options, field.name)]
            print(statistics.markdown(statistics.Setup(**{name: getattr(options, name) for name in names})))
    except (ValueError, UnsupportedError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
