# SPDX-License-Identifier: Apache-2.0
"""Cost of a routing strategy in a training step, compared with Megatron's own global load balancing.

    python benchmarks/smar_overhead.py [--strategy smar ...] [--shape demo mixtral] [--ranks 2] [--quick] [--json]
    python benchmarks/smar_overhead.py --strategy smar "smoes --smoes-scores gaussian" hard

For each strategy and shape a model, with expert parallelism over all ranks (the program starts itself under torchrun),
is trained by Megatron's `train_step` on one batch in three settings, which alternate step by step:

    none             Megatron's router without this project's code: attributes of each live router call the methods of
                     `TopKRouter` directly. No bias, no statistics, no loss; `finish` then returns its input.
    strategy         these attributes are removed: the router's own code, as in training with `--modality-routing`,
                     with statistics over all ranks.
    global_aux_loss  like none, but the router's `routing_type` is `global_aux_loss` instead of `none`: Megatron reads
                     it in each forward pass, and the model is built with that loss, so its buffers exist.

All three run in the same process on the same weights, optimizer and process groups. The order alternates (ABC, CBA), so
that drift cancels. The result is the median over triples of the ratio to `none`, with quartiles. A step is one
`train_step`: forward, backward, reductions and optimizer, without the loader and without what is logged once per step.

Single steps vary by more than a strategy costs, so its parts are also measured in separate steps, by events around the
real functions (`torch.cuda.Event`: the device's time on CUDA; on the CPU the runtime replaces it by the host's clock).
The extra backward pass is timed separately, on the routers' inputs of a real step. `global_aux_loss` waits for the
other ranks inside the router, so its sum includes their lag, for which the other settings wait in the dispatch.
Collectives and operations are counted in torch's dispatcher, kernels in the code that torch.compile generates for CUDA,
also on a machine without a GPU. The CUDA code has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.routed_training import BALANCE, BASE, STRATEGY, Shape, Training, forget_megatron, save_vision_model
from benchmarks.router_cost import count, percent_over, time_backward, time_parts, time_triples
from megatron_smar.routing.strategies import STRATEGIES

LIMIT_SECONDS = 150.0  # time limit for a shape's triples, on a slow or busy machine
QUICK_LIMIT_SECONDS = 8.0

SHAPES = {
    "demo": Shape(128, 320, 4, 128, 8, 2048, triples=80, quick_triples=6, heads=4, groups=2),
    # A layer of Mixtral 8x7B at an eighth of its width. The vocabulary is small, so that the layer dominates the step.
    "mixtral": Shape(512, 1792, 1, 512, 2, 512, triples=60, quick_triples=4),
}
# The largest overhead, in percent of a step of shape `mixtral`, that a strategy is meant to have.
GOALS = {"smar": 1.0, "smoes --smoes-scores gaussian": 2.0, "smoes --smoes-scores attention": 5.0}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy",
        nargs="+",
        default=["smar"],
        metavar="NAME",
        help=f"Strategies: {', '.join(STRATEGIES)}; each may be followed by flags of its own, all in one word, as in "
        "'layer_split --layer-split-layers 2'. Default: smar.",
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="Default: all.")
    parser.add_argument("--ranks", type=int, default=2, help="Processes; expert-parallel size. Default: %(default)s.")
    parser.add_argument("--triples", type=int, help="Triples of timed steps, instead of the shape's own number.")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32.")
    parser.add_argument("--quick", action="store_true", help="Few triples, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    unknown = [given for given in options.strategy if given.split(" ")[0] not in STRATEGIES]
    if unknown:
        parser.error(f"--strategy {unknown[0]!r} does not begin with one of {', '.join(STRATEGIES)}.")
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    experts = min(SHAPES[name].experts for name in options.shape)
    if options.ranks < 2 or experts % options.ranks:
        parser.error(f"--ranks {options.ranks} cannot share {experts} experts out; give 2, 4 or 8.")
    if options.triples is not None and options.triples < 2:
        parser.error(f"--triples {options.triples} gives no quartiles; give 2 or more.")
    return options


def relaunch(ranks: int) -> None:
    """Replaces this process by torchrun with the same command line."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # ranks that wait must not spin
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


def measure(strategy: str, name: str, options: argparse.Namespace, vision_path: str) -> dict[str, Any]:
    """Measures one strategy in one shape; the results are the same on all ranks."""
    shape = SHAPES[name]
    modality_routing, *own_flags = strategy.split()
    training = Training(shape, options.ranks, vision_path, options.bf16, modality_routing, own_flags)
    triples = options.triples or (shape.quick_triples if options.quick else shape.triples)
    limit = QUICK_LIMIT_SECONDS if options.quick else LIMIT_SECONDS
    times = time_triples(training, f"{strategy}, {name}", triples, limit)
    rounds = max(2, len(times[BASE]) // 4)
    parts, backward = time_parts(training, rounds), time_backward(training, 10 * rounds)
    counts = count(training)
    step = statistics.median(times[BASE])
    balance = parts.pop(BALANCE) + backward[BALANCE]
    breakdown = {part: 100 * value / step for part, value in (parts | {"extra_backward": backward[STRATEGY]}).items()}
    own, own_quartiles = percent_over(times[STRATEGY], times[BASE])
    other, other_quartiles = percent_over(times[BALANCE], times[BASE])
    return {
        "step_overhead_percent": own,
        "step_overhead_quartiles": own_quartiles,
        "goal_percent": GOALS.get(strategy) if name == "mixtral" else None,
        "global_aux_loss_overhead_percent": other,
        "global_aux_loss_overhead_quartiles": other_quartiles,
        "exposed_wait_percent": breakdown["exposed_wait"],
        "breakdown_percent": breakdown,
        "breakdown_sum_percent": sum(breakdown.values()),
        "global_aux_loss_sum_percent": 100 * balance / step,
        "collectives_per_layer": counts[STRATEGY]["collectives"],
        "floats_per_layer": counts[STRATEGY]["floats"],
        "operations_per_layer": counts[STRATEGY]["operations"],
        "kernels_per_layer": counts[STRATEGY]["kernels"],
        "global_aux_loss_collectives_per_layer": counts[BALANCE]["collectives"],
        "global_aux_loss_operations_per_layer": counts[BALANCE]["operations"],
        "step_seconds": step,
        "triples": len(times[BASE]),
        "tokens_per_rank": shape.micro_batch_size * shape.seq_length,
        "shape": asdict(shape),
    }


def print_table(strategy: str, name: str, result: dict[str, Any], ranks: int) -> None:
    """Prints the results of one strategy and shape."""
    step, layers = result["step_seconds"], result["shape"]["layers"]
    print(
        f"\n{strategy}, {name}: {ranks} ranks, {result['tokens_per_rank']} tokens each, MoE layers: {layers}; "
        f"step {step:.3f} s"
    )
    print(f"{'over no auxiliary loss, median of ' + str(result['triples']) + ' triples':44}      %   quartiles")
    for label, key in (("strategy", "step_overhead"), (BALANCE, "global_aux_loss_overhead")):
        lower, upper = result[f"{key}_quartiles"]
        print(f"  {label:40} {result[f'{key}_percent']:8.3f}   {lower:.2f} to {upper:.2f}")
    if result["goal_percent"] is not None:
        print(f"  {'the goal: at most':40} {result['goal_percent']:8.3f}")
    print(f"{'parts of the strategy':44}      %   microseconds per layer")
    rows = result["breakdown_percent"] | {"sum": result["breakdown_sum_percent"]}
    for label, value in (
        rows | {"(global_aux_loss, with waiting for ranks)": result["global_aux_loss_sum_percent"]}
    ).items():
        print(f"  {label:40} {value:8.3f}   {value / 100 * step / layers * 1e6:.0f}")
    print(f"{'added per layer and micro-batch':44} strategy   {BALANCE}")
    for label, key in (("collectives", "collectives_per_layer"), ("operations", "operations_per_layer")):
        print(f"  {label:40} {result[key]:8g}   {result[f'global_aux_loss_{key}']:g}")
    print(f"  {'kernels, compiled':40} {result['kernels_per_layer']:8g}")
    print(f"  {'floats all-reduced by the strategy':40} {result['floats_per_layer']:8g}")


def scalars(shapes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of the shape `mixtral`, or else of the first one."""
    top = shapes.get("mixtral", next(iter(shapes.values())))
    return {key: value for key, value in top.items() if isinstance(value, float)}


def main() -> None:
    """Measures every strategy in every shape and prints the tables."""
    options = parse()
    if "WORLD_SIZE" not in os.environ:
        relaunch(options.ranks)
    from megatron_smar import runtime

    device = runtime.install()
    import torch

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_vision_model(folder)  # by each rank separately, before there are process groups
        for strategy in options.strategy:
            for name in options.shape:
                result = measure(strategy, name, options, folder)
                results.setdefault(strategy, {})[name] = result
                if torch.distributed.get_rank() == 0:
                    print_table(strategy, name, result, options.ranks)
                forget_megatron()
    if torch.distributed.get_rank() == 0 and options.json:
        first = results[options.strategy[0]]
        settings = {"ranks": options.ranks, "device": device, "dtype": "bfloat16" if options.bf16 else "float32"}
        each = {strategy: scalars(shapes) | {"shapes": shapes} for strategy, shapes in results.items()}
        print(json.dumps(scalars(first) | settings | {"shapes": first, "strategies": each}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
