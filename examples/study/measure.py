# SPDX-License-Identifier: Apache-2.0
"""Measures one checkpoint of the study: language, picture questions and routing on a split, in one process.

Where experts would be placed is planned from the loads on one split and counted on the other, for every strategy alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_smar import runtime

runtime.install_or_exit()

import torch
import torch.distributed as dist
from megatron.training import get_args

from megatron_smar.commands.evaluate import add_samples, load_model, read_records
from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.held_out import read_questions
from megatron_smar.evaluation.encoder import HeldOutEncoder
from megatron_smar.evaluation.evaluator import Evaluator, exact_match, perplexity, word_completion
from megatron_smar.monitoring.recorder import recorded_routing
from megatron_smar.placement.dispatch import DispatchCounter, counted
from megatron_smar.placement.plan import Plan
from megatron_smar.placement.report import assignments
from megatron_smar.routing.specialization import modality_specialization_index

DEVICES = 2


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line; the remaining flags are those of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_samples(parser)
    parser.add_argument("--plan-vqa", type=Path, required=True, help="questions to plan the placement from")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the measures")
    return parser.parse_known_args()


def count(evaluator: Evaluator, samples: list[EncodedSample], counter: DispatchCounter) -> DispatchCounter:
    """Passes samples through the model and counts what its MoE layers dispatch."""
    with counted([evaluator.model], counter):
        evaluator.route(samples, "routing", lambda rows: setattr(counter, "rows", rows))
    counter.reduce([evaluator.groups.dp])
    return counter


def routing(evaluator: Evaluator, samples: list[EncodedSample], planned: list[EncodedSample]) -> dict[str, Any]:
    """Returns the routing of the samples, by layer, with the experts placed by the loads on the planned samples."""
    args = get_args()
    loads = {layer: load[:-1] for layer, load in count(evaluator, planned, DispatchCounter({})).loads.items()}
    plan = Plan.of_loads(loads, DEVICES, "loads", {})
    present = {layer: list(range(plan.num_experts)) for layer in plan.orders}
    with recorded_routing([evaluator.model]) as recorder:
        counter = count(evaluator, samples, DispatchCounter(assignments(present, plan.orders, [DEVICES])))
    chosen = torch.stack([load[:-1] for load in counter.loads.values()])  # [L, M, E] without padding
    return {
        "mrd_distance": list(recorder.distances(args.moe_router_topk, args.smar_eps).values()),
        "msi": modality_specialization_index(chosen / chosen.sum(dim=-1, keepdim=True)).tolist(),
        "load_entropy": load_entropy(chosen.sum(dim=1)).tolist(),
        "crossing": {name.split()[0]: crossing(counter, name) for name in counter.traffic},
        "expert_load": chosen.tolist(),
    }


def load_entropy(chosen: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of each layer's load [L, E] over that of an even load, [L]: 1 is even, 0 one expert."""
    shares = chosen / chosen.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1) / torch.tensor(float(chosen.shape[-1])).log()


def crossing(counter: DispatchCounter, name: str) -> float:
    """Returns the share of text and vision tokens whose experts lie on both devices, the mean of the layers."""
    layers = counter.traffic[name].values()
    shares = [float(layer.merged(range(len(layer.tokens) - 1)).crossing) for layer in layers]
    return sum(shares) / len(shares)


def measure(options: argparse.Namespace, evaluator: Evaluator, encoder: HeldOutEncoder) -> dict[str, Any]:
    """Returns all measures of the loaded checkpoint."""
    texts = [encoder.passage(str(record["id"]), record) for record in options.texts]
    questions, planned = (
        [encoder.question(item, options.image_root) for item in items] for items in (options.questions, options.planned)
    )
    scores, answers = evaluator.score(texts, "texts"), evaluator.score(questions, "questions")
    by_kind = defaultdict(list)
    for item, answer in zip(options.questions, answers, strict=True):
        by_kind[item["kind"]].append(answer)
    return {
        "word_accuracy": word_completion(scores),
        "text_perplexity": perplexity(scores),
        "vqa_accuracy": exact_match(answers),
        "vqa_by_kind": {kind: exact_match(found) for kind, found in sorted(by_kind.items())},
        **routing(evaluator, questions, planned),
    }


def main() -> None:
    """Measures and writes the result."""
    options, flags = parse()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    read_records(options)
    options.planned = read_questions(options.plan_vqa, options.image_root)
    found = measure(options, *load_model(options, flags))
    part = options.output.with_suffix(".part")  # the file is there as a whole or not at all
    part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    part.replace(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
