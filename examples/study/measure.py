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
from statistics import fmean
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
from megatron_smar.evaluation.evaluator import Evaluator, Score, exact_match, perplexity, word_completion
from megatron_smar.monitoring.recorder import recorded_routing
from megatron_smar.placement.dispatch import DispatchCounter, counted
from megatron_smar.placement.plan import Plan
from megatron_smar.placement.report import assignments
from megatron_smar.routing.specialization import expert_load, load_entropy, modality_specialization_index

DEVICES = 2


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line; the remaining flags are those of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_samples(parser)
    parser.add_argument("--plan-vqa", type=Path, required=True, help="questions to plan the placement from")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the measures")
    return parser.parse_known_args()


def plan_of(evaluator: Evaluator, samples: list[EncodedSample]) -> Plan:
    """Returns where the experts would be placed by the loads on the samples."""
    counter = DispatchCounter({})
    with counted([evaluator.model], counter):
        evaluator.route(samples, "placement", lambda rows: setattr(counter, "rows", rows))
    counter.reduce([evaluator.groups.dp])
    return Plan.of_loads({layer: load[:-1] for layer, load in counter.loads.items()}, DEVICES, "loads", {})


def score(
    evaluator: Evaluator, samples: list[EncodedSample], name: str, plan: Plan
) -> tuple[list[Score], dict[str, Any]]:
    """Returns the samples' scores and their routing, by layer, with the experts placed by the plan."""
    args = get_args()
    present = {layer: list(range(plan.num_experts)) for layer in plan.orders}
    counter = DispatchCounter(assignments(present, plan.orders, [DEVICES]))
    with recorded_routing([evaluator.model]) as recorder, counted([evaluator.model], counter):
        scores = evaluator.score(samples, name, lambda rows: setattr(counter, "rows", rows))
    counter.reduce([evaluator.groups.dp])
    chosen = torch.stack([load[:-1] for load in counter.loads.values()])  # [L, M, E] without padding
    return scores, {
        "mrd_distance": list(recorder.distances(args.moe_router_topk, args.smar_eps).values()),
        "msi": modality_specialization_index(expert_load(chosen)).tolist(),
        "load_entropy": relative_entropy(chosen.sum(dim=1)).tolist(),
        "dispatch": {name.split()[0]: dispatch(counter, name) for name in counter.traffic},
        "expert_load": chosen.tolist(),
    }


def relative_entropy(chosen: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of each layer's load [L, E] over that of an even load, [L]: 1 is even, 0 one expert."""
    return load_entropy(expert_load(chosen)) / torch.tensor(float(chosen.shape[-1])).log()


def dispatch(counter: DispatchCounter, name: str) -> dict[str, dict[str, float]]:
    """Returns the share of tokens whose experts lie on both devices, and the devices per token, means of the layers.

    Both for text, for vision, and for all tokens of the two.
    """
    layers = list(counter.traffic[name].values())
    text, vision = range(len(layers[0].tokens) - 1)
    found = {}
    for scope, classes in {"text": [text], "vision": [vision], "all": [text, vision]}.items():
        parts = [layer.merged(classes) for layer in layers if layer.tokens[classes].sum() > 0]
        if parts:
            crossing, devices = (
                fmean(float(getattr(part, what)) for part in parts) for what in ("crossing", "devices")
            )
            found[scope] = {"crossing": crossing, "devices": devices}
    return found


def measure(options: argparse.Namespace, evaluator: Evaluator, encoder: HeldOutEncoder) -> dict[str, Any]:
    """Returns all measures of the loaded checkpoint, and each sample's share in them."""
    texts = [encoder.passage(str(record["id"]), record) for record in options.texts]
    questions, planned = (
        [encoder.question(item, options.image_root) for item in items] for items in (options.questions, options.planned)
    )
    plan = plan_of(evaluator, planned)
    scores, on_texts = score(evaluator, texts, "texts", plan)
    answers, on_questions = score(evaluator, questions, "questions", plan)
    by_kind = defaultdict(list)
    for item, answer in zip(options.questions, answers, strict=True):
        by_kind[item["kind"]].append(answer)
    return {
        "word_accuracy": word_completion(scores),
        "text_perplexity": perplexity(scores),
        "vqa_accuracy": exact_match(answers),
        "vqa_by_kind": {kind: exact_match(found) for kind, found in sorted(by_kind.items())},
        **on_questions,
        "texts": {name: on_texts[name] for name in ("load_entropy", "dispatch", "expert_load")},
        "words_completed": [each.words_completed for each in scores],
        "answered": "".join("01"[answer.exact] for answer in answers),
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
