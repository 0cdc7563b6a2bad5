# SPDX-License-Identifier: Apache-2.0
r"""Places experts on expert-parallel ranks by modality, and reports what that saves; docs/placement.md.

    tools/placement.py plan --load CHECKPOINT --devices 8 --output plan.json  [--text FILE --vqa FILE ...]
    tools/placement.py apply --load CHECKPOINT --plan plan.json --output PLACED
    tools/placement.py apply --load PLACED --undo --output BACK
    torchrun --nproc-per-node 2 tools/placement.py report --load CHECKPOINT --plan plan.json --text FILE --vqa FILE \
        --output report.json  [--expert-model-parallel-size 2 ...]

`plan` sorts the experts of each layer by their share of text and cuts them into one bin per device. The loads are
those that the routing strategy keeps in the checkpoint, or are counted on the samples in --text and --vqa, which have
the form that tools/evaluate.py takes. `apply` writes the checkpoint with its experts moved, so that the run of experts
that Megatron puts on a rank is a bin; the model computes the same, and a run resumes from it. `report` counts what the
MoE layers dispatch for the samples, before and after.
Flags of pretrain_vlm.py (layout, precision, ...) go to the model that `plan` and `report` run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_smar import runtime

# `apply` reads and writes files; the other commands run the model.
runtime.install_or_exit("cpu" if "apply" in sys.argv[1:2] else None)

import torch.distributed as dist
from megatron.training import get_args
from tqdm import tqdm

from megatron_smar.checkpoint.describe import decimal_bytes
from megatron_smar.checkpoint.expert_order import Orders
from megatron_smar.commands.evaluate import add_samples, load_model, read_records
from megatron_smar.data.rejects import SampleError
from megatron_smar.evaluation.encoder import HeldOutEncoder
from megatron_smar.placement.dispatch import Assignments, DispatchCounter, counted
from megatron_smar.placement.figure import write_figure
from megatron_smar.placement.permute import PlacedCheckpoint, apply_plan, undo
from megatron_smar.placement.plan import Plan, check_devices, read_plan
from megatron_smar.placement.report import (
    Dispatched,
    assignments,
    device_counts,
    headline,
    report,
    table,
    write_json,
)
from megatron_smar.training.setup import fail

LOADS = "loads"  # buffer of a strategy that averages the loads over the training, [M, E]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planned = commands.add_parser("plan", help="decide which expert goes to which device")
    planned.add_argument("--devices", type=int, required=True, help="expert-parallel ranks to place the experts on")
    planned.add_argument("--output", type=Path, required=True, help="JSON file for the plan")
    applied = commands.add_parser("apply", help="write the checkpoint with its experts at the places of a plan")
    what = applied.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="file that `plan` wrote")
    what.add_argument("--undo", action="store_true", help="move all experts back to their first places")
    applied.add_argument("--output", type=Path, required=True, help="new folder, for --load")
    reported = commands.add_parser("report", help="count crossing and bytes before and after a placement")
    reported.add_argument("--plan", type=Path, help="file that `plan` wrote. Default: the placement of the checkpoint")
    reported.add_argument(
        "--devices", type=int, nargs="+", default=[2, 4, 8], help="numbers of devices (default: %(default)s)"
    )
    reported.add_argument("--output", type=Path, required=True, help="JSON file for the numbers")
    reported.add_argument(
        "--json",
        action="store_true",
        help="print the crossing for the first fitting number of --devices as one JSON object, last line",
    )
    reported.add_argument("--figure", type=Path, help="file for the figure. Default: --output with .png")
    for command in (planned, applied, reported):
        command.add_argument("--load", type=Path, required=True, help="folder of the checkpoint")
        command.add_argument("--ckpt-step", type=int, help="step of the checkpoint. Default: the latest")
    for command in (planned, reported):
        add_samples(command)
    return parser


def model_flags(options: argparse.Namespace, flags: list[str]) -> list[str]:
    """Returns the flags of pretrain_vlm.py for the model that is run."""
    step = [] if options.ckpt_step is None else ["--ckpt-step", str(options.ckpt_step)]
    return [*flags, "--load", str(options.load), *step]


def make_plan(options: argparse.Namespace, flags: list[str], checkpoint: PlacedCheckpoint) -> Plan:
    """Makes the plan from the loads in the checkpoint, or from loads counted on samples if any are given.

    Raises:
        ValueError: There are neither.
    """
    check_devices(options.devices, checkpoint.num_experts)
    checkpoint.check_movable()
    numbering = checkpoint.order.layers if checkpoint.order else {}
    if options.texts or options.questions:
        counter, _ = count(options, flags, {})
        loads = {layer: load[:-1] for layer, load in counter.loads.items()}  # without padding
        number = len(options.texts) + len(options.questions)
        return Plan.of_loads(loads, options.devices, f"loads counted on {number} samples", numbering)
    loads = checkpoint.state(LOADS)
    if not any(load.any() for load in loads.values()):
        raise ValueError(
            f"{checkpoint.name} keeps no loads of its experts (--modality-routing {checkpoint.strategy.name}): give "
            "samples to count them on, --text or --vqa."
        )
    source = f"the loads that --modality-routing {checkpoint.strategy.name} averaged"
    return Plan.of_loads(loads, options.devices, source, numbering)


def count(
    options: argparse.Namespace, flags: list[str], assigned: Assignments
) -> tuple[DispatchCounter, HeldOutEncoder]:
    """Runs the model on the samples, and counts what its MoE layers dispatch."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)  # torchrun sets them for several ranks
    evaluator, encoder = load_model(options, model_flags(options, flags))
    counter = DispatchCounter(assigned)
    try:
        samples = [encoder.passage(str(r.get("id", i)), r) for i, r in enumerate(options.texts)]
        samples += [encoder.question(item, options.image_root) for item in options.questions]
    except SampleError as error:  # a sample that is too long for the flags
        fail(error)
    with counted([evaluator.model], counter):
        evaluator.route(samples, "samples", lambda rows: setattr(counter, "rows", rows))
    shards = [evaluator.groups.tp] if get_args().sequence_parallel else []
    counter.reduce([evaluator.groups.dp, *shards])
    return counter, encoder


def make_report(options: argparse.Namespace, flags: list[str], checkpoint: PlacedCheckpoint) -> dict[str, Any]:
    """Counts the dispatch before and after the placement.

    Raises:
        ValueError: There is no placement, or there are no samples.
    """
    if not options.texts and not options.questions:
        raise ValueError("report counts on samples: give --text, --vqa, or both.")
    before, after = orders_of(options, checkpoint)
    devices = device_counts(checkpoint.num_experts, options.devices)
    counter, encoder = count(options, flags, assignments(before, after, devices))
    args = get_args()
    hidden = getattr(args, "moe_latent_size", None) or args.hidden_size
    names = tuple(modality.name for modality in encoder.text.modalities)
    size = hidden * args.params_dtype.itemsize
    return report(Dispatched(names, args.num_experts, args.moe_router_topk, size, counter.traffic))


def orders_of(options: argparse.Namespace, checkpoint: PlacedCheckpoint) -> tuple[Orders, Orders]:
    """Returns the expert at each place before and after the placement, in the checkpoint's present numbers.

    Raises:
        ValueError: There is neither a plan nor a placement, or the plan does not fit.
    """
    present = {layer: list(range(checkpoint.num_experts)) for layer in checkpoint.layers}
    if options.plan is not None:
        plan = read_plan(options.plan)
        checkpoint.check_plan(plan)
        return present, plan.orders
    if checkpoint.order is None:
        raise ValueError(f"{checkpoint.name} has not been placed: give the plan to report on, --plan.")
    return {layer: checkpoint.places_before(layer) for layer in checkpoint.layers}, present


def main() -> None:
    """Runs one command; a user's mistake is reported in one sentence."""
    parser = build_parser()
    options, flags = parser.parse_known_args()
    if flags and options.command == "apply":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        checkpoint = PlacedCheckpoint(options.load, options.ckpt_step)
        if options.command == "apply":
            write_placed(options, checkpoint)
            return
        read_records(options)
        if options.command == "plan":
            plan = make_plan(options, flags, checkpoint)
            if is_first:
                plan.write(options.output)
                print(plan.table())
        else:
            content = make_report(options, flags, checkpoint)
            if is_first:
                figure = options.figure or options.output.with_suffix(".png")
                write_json(options.output, content)
                write_figure(figure, content)
                print(f"{table(content)}\n\n{options.output}, {figure}")
                if options.json:
                    print(json.dumps(headline(content)))
    except ValueError as error:
        fail(error)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def write_placed(options: argparse.Namespace, checkpoint: PlacedCheckpoint) -> None:
    """Writes the checkpoint with its experts moved."""
    plan = None if options.undo else read_plan(options.plan)
    with tqdm(unit="B", unit_scale=True, desc=f"writing {options.output}") as bar:
        if plan is None:
            undo(checkpoint, options.output, bar.update)
        else:
            apply_plan(checkpoint, plan, options.output, bar.update)
        written = bar.n
    what = "with its experts at their first places" if plan is None else f"placed for {plan.devices} devices"
    print(f"{options.output} is written: {options.load}, {what}, {decimal_bytes(written)}; load it with --load.")


if __name__ == "__main__":
    main()
