# SPDX-License-Identifier: Apache-2.0
"""The content of the demo's report: what a variant of stage 2 measured, and what it started from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_headline import MEASURES
from paired import interval, sign_flip_p
from stages import AFTER, BEFORE, PLACEMENT_LOGS, STAGES, TEXT_ONLY, Demo, VariantRun, results_of
from variants import DEFAULT, settings

from megatron_smar.report.run import read_run
from megatron_smar.report.scalars import read_scalars
from megatron_smar.routing.specialization import modality_specialization_index
from megatron_smar.routing.strategies import STRATEGIES

TITLE = "megatron_smar demo: a small MoE learns to see"


def content(
    demo: Demo,
    run: VariantRun,
    others: Sequence[VariantRun] = (),
    pairs: Sequence[tuple[VariantRun, VariantRun]] = (),
) -> dict[str, Any]:
    """Returns the content of a variant's report.

    Args:
        demo: The shared steps.
        run: The variant.
        others: Variants to compare it with.
        pairs: For each further seed, the variant and what it is compared with.
    """
    before, after = results_of(demo.steps[BEFORE]), run.results
    corpus = json.loads((demo.output / "corpus" / "summary.json").read_text())
    items = json.loads((demo.output / "scenes" / "vqa_held_out.json").read_text())
    chance = {item["kind"]: item["chance"] for item in items}
    trained = read_run(run.stage2.folder)
    text_only = run.variant.flags.get("text-only-ratio", TEXT_ONLY)
    report = {
        "title": TITLE if run.variant.label == DEFAULT else f"{TITLE} ({run.variant.label})",
        "routing": run.variant.label,
        "retention": after["word_accuracy"] / before["word_accuracy"],
        "unigram_perplexity": corpus["unigram_perplexity"],
        "vqa_accuracy": after["vqa_accuracy"],
        "vqa_accuracy_before": before["vqa_accuracy"],
        "vqa_chance": sum(item["chance"] for item in items) / len(items),
        "vqa_by_kind": {k: v | {"chance": chance[k]} for k, v in after["vqa_by_kind"].items()},
        "mrd_distance_by_layer": after["mrd_distance_by_layer"],
        "mrd_distance_by_layer_before": before["mrd_distance_by_layer"],
        "band": None if trained.band is None else list(trained.band),
        "steps": {name: (settings(name) | demo.added(name))["train-iters"] for name in STAGES},
        "seconds": _seconds(demo, run),
        "config": {
            **{name: _named(settings(name) | demo.added(name)) for name in ("model", "optimizer", *STAGES)},
            "routing": _routing(vars(trained.arguments)),
            "data": {"text_only_ratio": text_only, "train_tokens": corpus["train_tokens"]},
        },
        "commands": _commands(demo, run),
        "history": {name: _history(demo, run, name) for name in STAGES},
        "expert_share": {"before": before["expert_share"], "after": after["expert_share"]},
        "examples": [_example(item, demo.output / "scenes") for item in after["examples"]],
    }
    report["config"]["stage2"] |= _named(run.variant.flags)
    for name in ("text_perplexity", "word_accuracy"):
        report |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    if others:
        report["comparison"] = [comparison(each.variant.label, before, each.results) for each in (*others, run)]
    if pairs:
        named = [[comparison(each.variant.label, before, each.results) for each in pair] for pair in pairs]
        report["paired"] = differences(named)
    return report


def differences(pairs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the paired differences of repeated comparisons: number of seeds, and by measure mean, interval and p.

    Args:
        pairs: For each seed, the `comparison` of the variant and of what it is compared with.
    """
    found = {name: [one[name] - other[name] for one, other in pairs] for name in MEASURES}
    return {
        "seeds": len(pairs),
        "differences": {
            name: interval(values)._asdict() | {"p": sign_flip_p(values)} for name, values in found.items()
        },
    }


def comparison(label: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one variant's numbers of the comparison, from the results of evaluate.py before and after stage 2."""
    distances = after["mrd_distance_by_layer"]
    return {
        "routing": label,
        "retention": after["word_accuracy"] / before["word_accuracy"],
        "vqa_accuracy": after["vqa_accuracy"],
        "text_perplexity_after": after["text_perplexity"],
        "mrd_distance": sum(distances) / len(distances),
        "msi": specialization(after["expert_share"]),
    }


def specialization(shares: Mapping[str, Any]) -> float:
    """Returns the Modality Specialization Index, the mean of the layers, from the experts' shares {name: [L, E]}."""
    loads = torch.tensor([shares[name] for name in shares], dtype=torch.float64).transpose(0, 1)  # [L, M, E]
    return float(modality_specialization_index(loads).mean())


def _routing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the strategy and its settings, as the checkpoint stores them."""
    strategy = STRATEGIES[arguments["modality_routing"]]
    named = {field.name: arguments.get(f"{strategy.name}_{field.name}") for field in strategy.flag_fields()}
    shared = {"eps": arguments["smar_eps"], "scope": arguments["smar_scope"]}
    given = {name: value for name, value in named.items() if value is not None}  # older code knew fewer flags
    return {"strategy": strategy.name, **given, **shared}


def _seconds(demo: Demo, run: VariantRun) -> dict[str, float]:
    steps = demo.steps | {"stage2": run.stage2, AFTER: run.evaluation}
    groups = {"data": ("corpus", "scenes", "shards"), "vision": ("vision",)}
    groups |= {name: (name,) for name in STAGES}
    groups["evaluation"] = (BEFORE, AFTER)
    seconds = {name: sum(steps[step].seconds for step in members) for name, members in groups.items()}
    return seconds | {"total": sum(seconds.values())}


def _history(demo: Demo, run: VariantRun, stage: str) -> dict[str, Any]:
    folder = run.stage2.folder if stage == "stage2" else demo.steps[stage].folder
    own = [metric.name for metric in STRATEGIES[run.variant.routing].metrics]
    wanted = ("mrd distance", "moe/mrd", *own) if stage == "stage2" else ()
    return {
        name: {"steps": list(series.steps), "values": list(series.values)}
        for name, series in read_scalars(folder / "tensorboard").items()
        if name == "lm loss" or (wanted and name.startswith(wanted))
    }


def _commands(demo: Demo, run: VariantRun) -> list[str]:
    """Returns the command of every program, in the order of their last runs."""
    of_variant = [f"{name}.command" for name in ("stage2", AFTER, *PLACEMENT_LOGS)]
    own = [path for name in of_variant if (path := run.folder / "logs" / name).exists()]
    shared = [path for path in (demo.output / "logs").glob("*.command") if path.name not in of_variant]
    return [path.read_text() for path in sorted([*shared, *own], key=lambda path: path.stat().st_mtime)]


def _example(item: Mapping[str, Any], images: Path) -> dict[str, Any]:
    return {
        "image": images / item["image"][0],
        "question": item["question"].replace("<image>\n", ""),
        "answer": item["answer"],
        "prediction": item["prediction"],
        "correct": item["prediction"] == item["answer"],
    }


def _named(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by names without dashes, for the report."""
    return {name.replace("-", "_"): value for name, value in flags.items()}
