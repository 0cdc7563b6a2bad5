# SPDX-License-Identifier: Apache-2.0
"""What the planner says of small models against what a training step does: memory, communication and operations.

    python benchmarks/plan_accuracy.py [--quick] [--json] [CASE ...]

Every case is a model in a parallel layout that trains for real, on CPU ranks with Gloo and Megatron's local layers.

    memory          The allocator's events of a step, up to the end of the last backward pass: the peak, and the part of
                    the model whose forward pass allocated what is alive then. Weights, gradients and optimizer state
                    are the sizes of the tensors; copies that Gloo makes are left out. The planner knows layout, sizes,
                    tiles, and how many tokens a rank's experts got, together and at most, which routing decides.
    communication   Every collective of the step that torch dispatches, by process group: calls and bytes, compared
                    exactly.
    operations      torch's FLOP counter over the step, with the math kernel of attention, which it sees.

The formulas were written for the first cases; the others are held out: combinations of layouts and other sizes, on
which nothing was adjusted. A part below a hundredth of the peak counts relative to that hundredth. GPUs run other
kernels: this says nothing of the planner's `fused` formulas.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measured_step import measure  # benchmarks/measured_step.py
from routed_training import IMAGE_TOKEN, TOKENS_PER_TILE, Shape, Training, flags  # benchmarks/routed_training.py
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(256, 512, 4, 512, 2, 2048, triples=0, quick_triples=0, heads=8, groups=4)
OTHER = Shape(192, 640, 8, 384, 1, 4096, triples=0, quick_triples=0, heads=6, groups=2, experts=4, top_k=3)
TOWER: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
SIDE, PATCH = 64, 8
PLAIN = ("--moe-router-load-balancing-type", "none")
TRAINED_TOWER = ("--freeze", "connector")
LATENT = (
    *("--freeze", "vision", "--multi-latent-attention", "--rope-type", "rope", "--qk-layernorm", "--kv-lora-rank"),
    *("64", "--qk-head-dim", "32", "--qk-pos-emb-head-dim", "16", "--v-head-dim", "24"),
)
QUERIES = ("--q-lora-rank", "96")
DENSE = ("--freeze", "vision", "--moe-layer-freq", "[0]+[1]*3", "--moe-shared-expert-intermediate-size", "384")


@dataclass(frozen=True)
class Case:
    """A model in a layout.

    Attributes:
        layout: Fields of `planning.layout.Layout`.
        shape: Sizes of the model and of a rank's micro-batch.
        tiles: Tiles of every row.
        micro_batches: Micro-batches of a replica per step.
        flags: Further flags of the trainer.
        held_out: Whether nothing was adjusted on it.
        quick: Whether --quick runs it.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    shape: Shape = SMALL
    tiles: int = 2
    micro_batches: int = 1
    flags: tuple[str, ...] = ("--freeze", "vision")
    held_out: bool = False
    quick: bool = False

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.layout["gpus"]


TP, FULL = {"tensor": 2}, {"granularity": "full", "layers": 1000}
CASES: dict[str, Case] = {
    "DP 2": Case({"gpus": 2}),
    "EP 2": Case({"gpus": 2, "expert": 2}, quick=True),
    "TP 2 + SP": Case({"gpus": 2, "tensor": 2}, quick=True),
    "TP 2, expert TP 2": Case({"gpus": 2, "tensor": 2, "expert_tensor": 2}),
    "PP 2": Case({"gpus": 2, "pipeline": 2}, micro_batches=4),
    "PP 2 interleaved": Case({"gpus": 2, "pipeline": 2, "chunks": 2}, micro_batches=4),
    "CP 2": Case({"gpus": 2, "context": 2}),
    "bf16": Case({"gpus": 1, "bf16": True}),
    "DP 2 without distributed optimizer": Case({"gpus": 2, "distributed_optimizer": False, "overlap": False}),
    "trained encoder": Case({"gpus": 1}, tiles=8, flags=TRAINED_TOWER),
    "recomputed, EP 2": Case({"gpus": 2, "expert": 2, "recomputation": FULL}),
    "latent attention": Case({"gpus": 1}, replace(SMALL, groups=8), flags=LATENT),
    "latent attention, TP 2": Case({"gpus": 2, "tensor": 2}, replace(SMALL, groups=8), flags=(*LATENT, *QUERIES)),
    "dense layer, shared experts, TP 2": Case({"gpus": 2, "tensor": 2}, flags=DENSE),
    "dense last layer, EP 2": Case(
        {"gpus": 2, "expert": 2}, OTHER, flags=("--freeze", "vision", "--moe-layer-freq", "([1]+[0])*4"), held_out=True
    ),
    "latent attention, bf16, TP 2 x CP 2": Case(
        {"gpus": 4, "tensor": 2, "context": 2, "bf16": True}, replace(OTHER, groups=6), flags=LATENT, held_out=True
    ),
    "latent attention, PP 2, recomputed": Case(
        {"gpus": 2, "pipeline": 2, "recomputation": FULL},
        replace(OTHER, groups=6),
        micro_batches=4,
        flags=(*LATENT, *QUERIES),
        held_out=True,
    ),
    "TP 2 x PP 2": Case({"gpus": 4, "tensor": 2, "pipeline": 2}, OTHER, micro_batches=4, held_out=True),
    "PP 2 x EP 2": Case({"gpus": 4, "pipeline": 2, "expert": 2}, OTHER, micro_batches=2, held_out=True),
    "TP 2 x EP 2": Case({"gpus": 2, "tensor": 2, "expert": 2}, OTHER, held_out=True, quick=True),
    "CP 2 x EP 2": Case({"gpus": 2, "context": 2, "expert": 2}, OTHER, held_out=True),
    "TP 2 x CP 2": Case({"gpus": 4, "tensor": 2, "context": 2}, OTHER, held_out=True),
    "bf16, DP 2, trained encoder": Case({"gpus": 2, "bf16": True}, OTHER, 6, flags=TRAINED_TOWER, held_out=True),
    "recomputed, PP 2": Case({"gpus": 2, "pipeline": 2, "recomputation": FULL}, OTHER, micro_batches=4, held_out=True),
}


def layout_of(case: Case) -> Any:
    """Returns the case's layout for the planner."""
    from megatron_smar.planning.layout import Layout
    from megatron_smar.planning.operations import Recomputation

    given = {"bf16": False, "fused": False, "micro_batch": case.shape.micro_batch_size} | case.layout
    given["recomputation"] = Recomputation(**given.get("recomputation", {}))
    return Layout(**given)


def batch_sizes(case: Case) -> Any:
    """Returns what a step of the case trains on, for the planner."""
    from megatron_smar.planning.layout import Batch

    rows = case.shape.micro_batch_size * case.micro_batches * layout_of(case).data
    pictures = case.tiles * TOKENS_PER_TILE / case.shape.seq_length
    return Batch(case.shape.seq_length, rows, tiles=case.tiles, predicted=1 - pictures)


def model_flags(case: Case, tower: str) -> list[str]:
    """Returns the trainer's flags for the model alone."""
    given = [*flags(case.shape, 1, tower, False, "smar"), *PLAIN]
    # Sizes of the batch and what --bf16 and the optimizer need are not the model's.
    dropped = ("--micro-batch-size", "--global-batch-size", "--train-iters", "--lr", "--tokenizer-type", "--vocab-size")
    for name in dropped:
        at = given.index(name)
        del given[at : at + 2]
    bias = ["--bf16"] if layout_of(case).bf16 else []
    return [word for word in given if word != "--use-distributed-optimizer"] + [*case.flags, *bias]


def save_tower(folder: str) -> None:
    """Saves the vision encoder."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(1)
    config = InternVLVisionConfig(**TOWER, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    InternVLVisionModel(config).save_pretrained(folder)


def micro_batch(case: Case, seed: int) -> Any:
    """Returns a micro-batch whose rows begin with their tiles."""

    from megatron_smar.data.batch import VisionLanguageBatch

    generator = torch.Generator().manual_seed(seed)
    size = (case.shape.micro_batch_size, case.shape.seq_length)
    ids = torch.randint(6, case.shape.vocabulary, size, generator=generator)
    ids[:, : case.tiles * TOKENS_PER_TILE] = IMAGE_TOKEN
    return VisionLanguageBatch(
        __key__=[str(seed)] * size[0],
        __restore_key__=(),
        input_ids=ids,
        labels=ids.roll(-1, dims=1),
        loss_mask=(ids != IMAGE_TOKEN).float(),
        padding_mask=torch.zeros(size, dtype=torch.bool),
        pixel_values=torch.randn(size[0] * case.tiles, 3, SIDE, SIDE, generator=generator),
    )


def train(case: Case, extra: list[str], folder: Path) -> Training:
    """Returns the training of a case on this rank."""
    layout, rank = layout_of(case), int(os.environ["RANK"])
    replica = rank // (layout.tensor * layout.context) % layout.data
    batches = [micro_batch(case, 97 * replica + number) for number in range(case.micro_batches)]
    without = [] if layout.distributed_optimizer else ["--use-distributed-optimizer"]
    return Training(
        case.shape, 1, str(folder / "tower"), layout.bf16, extra=[*extra, *PLAIN], batches=batches, without=without
    )


def run_rank(name: str, folder: Path) -> None:
    """Runs a case on this rank, in a process that torchrun started, and writes what was measured."""
    from megatron_smar import runtime

    runtime.install()
    import torch.distributed as dist

    rank, extra = os.environ["RANK"], json.loads((folder / "flags.json").read_text())
    measured = measure(train(CASES[name], extra, folder), str(folder / f"trace{rank}.json"))
    (folder / f"rank{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


# ---- all cases


def run_case(name: str, case: Case, tower: Path) -> list[dict[str, Any]]:
    """Runs a case on its ranks and compares; returns a row for every rank."""
    from megatron_smar.conversion.model_shape import shape_of_flags

    layout, batch = layout_of(case), batch_sizes(case)
    shape = shape_of_flags(model_flags(case, str(tower)), case.shape.vocabulary)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "tower").symlink_to(tower)
        (folder / "flags.json").write_text(json.dumps([*layout.flags(shape, batch), *case.flags]))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        command = [sys.executable, *launch, __file__, "--rank-of", name, "--folder", made]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"the case {name} failed:\n{done.stdout[-6000:]}")
        measured = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(case.ranks)]
    rows = [compared(name, case, shape, rank, found) for rank, found in enumerate(measured)]
    operations = sum(row["operations"] for row in rows)
    for row in rows:
        row["operations_error"] = 100 * (planned_operations(case, shape) / operations - 1)
    return rows


def compared(name: str, case: Case, shape: Any, rank: int, found: dict[str, Any]) -> dict[str, Any]:
    """Returns what was planned for a rank of a case beside what was measured."""
    from megatron_smar.planning.activations import peaks
    from megatron_smar.planning.communication import communication
    from megatron_smar.planning.memory import Place, memory

    layout, batch = layout_of(case), batch_sizes(case)
    batch = replace(batch, predicted=predicted_share(case, rank))
    stage, within = divmod(rank, case.ranks // layout.pipeline)
    place = Place(stage, within // layout.tensor, within // (layout.expert_tensor * layout.expert))
    even = case.shape.micro_batch_size * case.shape.seq_length * case.shape.top_k
    even *= layout.expert_tensor / (layout.context * layout.tensor)
    static = memory(shape, layout, batch, place).by_part()
    shares, chunks = [count / even for count in found["routed"]], layout.layers_of(shape, stage)
    busiest = [count / even * shape.decoder.experts / layout.expert for count in found["busiest"]]
    with_experts = [shape.decoder.moe_layers[layer] for chunk in chunks for layer in chunk]
    size, of_experts = len(chunks[0]), iter(zip(shares, busiest, strict=True))
    passes = len(shares) // sum(with_experts)
    of_layers = [next(of_experts) if has_experts else (1.0, None) for has_experts in with_experts * passes]
    moments = [
        static | dataclasses.asdict(moment)
        for start in range(0, len(of_layers), size)
        for moment in peaks(
            shape, layout, batch, stage, sum(shares) / len(shares), backward=of_layers[start : start + size]
        )
    ]
    planned = closest(moments, found["parts"])
    received = round(found["received"] * sum(with_experts) * case.micro_batches)
    expected: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for one in communication(shape, layout, batch, place, received):
        calls[one.group, one.operation] += one.calls
        expected[one.group, one.operation] += one.bytes
    happened = {(group, operation): (number, size) for group, operation, number, size in found["collectives"]}
    different = {
        f"{group} {operation}": [
            [calls[group, operation], expected[group, operation]],
            happened.get((group, operation)),
        ]
        for group, operation in sorted(calls.keys() | happened.keys())
        if (calls[group, operation], expected[group, operation]) != tuple(happened.get((group, operation), (0, 0)))
    }
    return {
        "case": name,
        "held_out": case.held_out,
        "rank": rank,
        "planned": planned,
        "measured": found["parts"],
        "collectives": different,
        "operations": found["operations"],
    }


def closest(moments: list[dict[str, int]], measured: dict[str, int]) -> dict[str, int]:
    """Returns the moment of the peak; of those within a hundredth of it, that which has the parts that were alive."""
    largest = max(sum(moment.values()) for moment in moments)
    near = [moment for moment in moments if sum(moment.values()) > 0.99 * largest]
    return min(near, key=lambda moment: sum(abs(size - measured.get(part, 0)) for part, size in moment.items()))


def predicted_share(case: Case, rank: int) -> float:
    """Returns the share of a rank's positions whose loss counts: under context parallelism it has two of 2 CP parts."""
    layout, length = layout_of(case), case.shape.seq_length
    if layout.context == 1:
        return batch_sizes(case).predicted
    part, index = length // (2 * layout.context), rank // layout.tensor % layout.context
    own = [position for p in (index, 2 * layout.context - 1 - index) for position in range(p * part, (p + 1) * part)]
    return sum(position >= case.tiles * TOKENS_PER_TILE for position in own) / len(own)


def planned_operations(case: Case, shape: Any) -> float:
    """Returns the operations of a step on all ranks, with the whole square of scores that the math kernel computes."""
    from megatron_smar.planning.duration import work_of_step
    from megatron_smar.planning.operations import operations

    layout, batch = layout_of(case), batch_sizes(case)
    work, decoder = replace(work_of_step(shape, batch), pairs=batch.rows * batch.sequence**2), shape.decoder
    # Values are padded to the size of keys.
    shape = replace(shape, decoder=replace(decoder, score_width=2 * decoder.query_width))
    return operations(shape, work, recomputation=layout.recomputation).total


def _joined(parts: dict[str, int]) -> dict[str, int]:
    joined = {name: size for name, size in parts.items() if name not in ("output", "temporary")}
    return joined | {"output + temporary": parts.get("output", 0) + parts.get("temporary", 0)}


def errors(row: dict[str, Any]) -> dict[str, float]:
    """Returns the error of every part and of the total in percent."""
    # Whether the loss or a layer's backward pass needs more decides what is alive at the peak: compared as one part.
    planned, measured = (_joined(row[name]) for name in ("planned", "measured"))
    total = sum(measured.values())
    planned["total"], measured["total"] = sum(planned.values()), total
    return {
        part: 100 * (planned[part] - measured.get(part, 0)) / max(measured.get(part, 0), total / 100)
        for part in planned
    }


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="cases to run. Default: all")
    parser.add_argument("--quick", action="store_true", help="three cases, within a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.case if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}.")
    return options


def main() -> None:
    """Runs the cases and prints the comparison."""
    sys.path.insert(0, str(ROOT))
    options = parse()
    if options.rank_of:
        run_rank(options.rank_of, options.folder)
        return
    os.environ.update(OMP_NUM_THREADS="1", MEGATRON_SMAR_DEVICE="cpu", PYTHONPATH=str(ROOT))
    from megatron_smar import runtime

    runtime.install("cpu")
    names = options.case or [name for name, case in CASES.items() if case.quick or not options.quick]
    rows: list[dict[str, Any]] = []
    titles = ("case", 42), ("rank", -5), ("peak MB", -9), ("total %", -9), ("  worst part %", 22), ("collectives", -13)
    header = "".join(f"{name:{'<' if size > 0 else '>'}{abs(size)}}" for name, size in (*titles, ("operations %", -14)))
    with tempfile.TemporaryDirectory() as folder:
        save_tower(folder)
        tqdm.write(header)
        for name in tqdm(names, desc="cases", disable=None):
            for row in run_case(name, CASES[name], Path(folder)):
                rows.append(row)
                tqdm.write(line_of(row))
    results = {
        "memory_error_percent_max": max(abs(value) for row in rows for value in errors(row).values()),
        "communication_exact": not any(row["collectives"] for row in rows),
        "flops_error_percent_max": max(abs(row["operations_error"]) for row in rows),
    }
    print(
        f"worst part of any rank {results['memory_error_percent_max']:.1f} %; collectives "
        f"{'the same in calls and bytes' if results['communication_exact'] else 'DIFFERENT'}; operations within "
        f"{results['flops_error_percent_max']:.1f} %"
    )
    if options.json:
        print(json.dumps(results | {"rows": rows}))


def line_of(row: dict[str, Any]) -> str:
    """Returns a rank's line of the table; below it the collectives that differ: planned and counted calls and bytes."""
    off = errors(row)
    worst = max((part for part in off if part != "total"), key=lambda part: abs(off[part]))
    peak = sum(row["measured"].values()) / 1e6
    name = f"{row['case']}{' (held out)' if row['held_out'] else ''}"
    line = f"{name:42}{row['rank']:5}{peak:9.1f}{off['total']:+9.2f}  {f'{worst} {off[worst]:+.1f}':20}"
    line += f"{'differ' if row['collectives'] else 'the same':>13}{row['operations_error']:+14.2f}"
    return "\n".join([line, *(f"    {name}: {values}" for name, values in row["collectives"].items())])


if __name__ == "__main__":
    main()
