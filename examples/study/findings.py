# SPDX-License-Identifier: Apache-2.0
"""What the study's results say: measures of a run, arms over seeds, paired differences, hypotheses, tuned values."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from grid import MAIN, TUNING, Grid, Run, tried_name, tried_settings
from paired import Interval, holm, interval, sign_flip_p

from megatron_smar.routing.specialization import expert_load, load_entropy

Result = Mapping[str, Any]
SIGNIFICANT = 0.05
SEEDS = 10  # pairs of each hypothesis
TOLERATED_LOSS = 0.02  # of picture questions: in the rule that chooses coefficients, and in claims to keep more
BASELINE = "none"
FRONTIER = "none_lr"  # arms that are `none` at other learning rates begin so


def _ratio(result: Result, name: str) -> float:
    """Returns a measure after stage 2 over that before it; NaN if that is 0: such a model has not learned anything."""
    before = result["before"][name]
    return result["after"][name] / before if before else math.nan


def _mean_after(name: str) -> Callable[[Result], float]:
    return lambda result: statistics.fmean(result["after"][name])


def _vision_entropy(result: Result) -> float:
    """Returns the entropy of the vision tokens' load relative to an even load, the mean of the layers."""
    shares = expert_load(torch.tensor(result["after"]["expert_load"]))  # [L, M, E]
    return float(load_entropy(shares)[:, 1].mean()) / math.log(shares.shape[-1])


def _crossing(scope: str) -> Callable[[Result], float]:
    return lambda result: result["after"]["dispatch"]["after"][scope]["crossing"]


MEASURES: dict[str, Callable[[Result], float]] = {
    "retention": lambda r: _ratio(r, "word_accuracy"),
    "perplexity": lambda r: _ratio(r, "text_perplexity"),
    "pictures": lambda r: r["after"]["vqa_accuracy"],
    "msi": _mean_after("msi"),
    "distance": _mean_after("mrd_distance"),
    "entropy": _mean_after("load_entropy"),
    "vision_entropy": _vision_entropy,
    "crossing": _crossing("all"),
    "vision_crossing": _crossing("vision"),
}


class Hypothesis(NamedTuple):
    """A directed claim about a paired difference.

    Attributes:
        claim: In words.
        model: The model.
        arm: The arm of which the claim is.
        other: The arm that it is compared with.
        measure: Name of the measure.
        sign: 1 if the difference arm - other should be above 0, -1 if below.
        margin: Added to the difference in the direction of the claim: above 0 for a claim of non-inferiority, below 0
            for a smallest effect.
    """

    claim: str
    model: str
    arm: str
    other: str
    measure: str
    sign: int
    margin: float = 0.0


HYPOTHESES = {
    "H1": Hypothesis("SMAR keeps more language than none", "large", "smar", BASELINE, "retention", 1),
    "H2": Hypothesis("SMAR keeps more language than balance", "large", "smar", "balance", "retention", 1),
    "H3": Hypothesis("a low band collapses the routing", "large", "smar_05", "smar", "entropy", -1, -0.05),
    "H4": Hypothesis("the modality bias helps", "large", "smar_15", "smar_15_no_bias", "retention", 1),
    "H5": Hypothesis("balance beside SMAR hurts", "large", "smar_15_balance", "smar_15", "retention", -1),
    "H6": Hypothesis(
        "SMoES keeps more than SMAR on many small experts", "small", "smoes_8", "smar", "retention", 1
    ),
    "H7": Hypothesis(
        "square-root weighting is not worse than SMAR (by 2 points)", "large", "sqrt", "smar", "retention", 1, 0.02
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the data says about a hypothesis.

    Attributes:
        difference: The paired difference without the margin.
        sampling: Half-width of the difference's 95 % interval over the held-out passages instead of the seeds; NaN for
            a measure that is not retention.
        pictures: The paired difference in picture questions.
        seeds: Number of pairs.
        p: The exact two-sided p value, of the difference with the margin.
        adjusted: The same after Holm's correction over all planned hypotheses.
        outcome: `supported`, `contradicted` or `undecided`; `traded` if the language that is kept is paid for with more
            picture questions than tolerated.
    """

    difference: Interval
    sampling: float
    pictures: Interval
    seeds: int
    p: float
    adjusted: float
    outcome: str


class Results:
    """The results of all runs of a grid that are done.

    Only seeds of which no run of a model is missing are used: means compare, and nobody looks at half of a seed.

    Args:
        grid: The grid.
        folder: Folder of the results.

    Attributes:
        found: The result of each run that succeeded.
        failed: What the runs that failed said, by the run's name.
        missing: Names of the runs without a result, or with one from other settings.
        codes: Number of results by the hash of the code that made them.
        unpaired: Models and seeds whose arms did not start from the same checkpoint.
        without_effect: Pairs of runs of a seed that have other settings and exactly the same measures.
        other_language: Parts and models whose seeds do not have the same language before their runs. They share a
            language model, and what is trained between it and the runs reads no text.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid = grid
        self.found: dict[Run, Result] = {}
        self.failed: dict[str, str] = {}
        self.missing: list[str] = []
        self.codes: Counter[str] = Counter()
        starts: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        languages: dict[tuple[str, str], set[tuple[int, ...]]] = defaultdict(set)
        same: dict[tuple[str, str, int, str], Run] = {}
        self.without_effect: list[str] = []
        for run in grid.runs():
            result = grid.result(run, folder)
            if result is None:
                self.missing.append(run.name)
            elif "failed" in result:
                self.failed[run.name] = result["failed"]
            else:
                self.found[run] = result
                self.codes[result["code"]] += 1
                starts[run.part, run.model, run.seed].add(json.dumps(result["before"]))
                languages[run.part, run.model].add(tuple(result["before"]["words_completed"]))
                other = same.setdefault((run.part, run.model, run.seed, json.dumps(result["after"])), run)
                if other.flags != run.flags:
                    self.without_effect.append(f"{other.name} and {run.name}")
        self.unpaired = ["/".join(map(str, start)) for start, measured in starts.items() if len(measured) > 1]
        self.other_language = ["/".join(name) for name, measured in languages.items() if len(measured) > 1]
        self._done = {
            (part, model): self._seeds_done(part, model)
            for part, named in ((TUNING, grid.tuning), (MAIN, grid.main))
            for model in named["runs"]
        }

    def arms(self, part: str, model: str) -> list[str]:
        """Returns the arms that have results, in the order of the grid."""
        done = self.seeds_done(part, model)
        found = (run.arm for run in self.found if (run.part, run.model) == (part, model) and run.seed in done)
        return list(dict.fromkeys(found))

    def of_arm(self, part: str, model: str, arm: str) -> dict[int, Result]:
        """Returns the results of an arm by seed."""
        runs = [run for run in self.found if (run.part, run.model, run.arm) == (part, model, arm)]
        return {run.seed: self.found[run] for run in runs if run.seed in self.seeds_done(part, model)}

    def values(self, part: str, model: str, arm: str, measure: str) -> dict[int, float]:
        """Returns a measure of an arm by seed."""
        return {seed: MEASURES[measure](result) for seed, result in self.of_arm(part, model, arm).items()}

    def pairs(self, part: str, model: str, arm: str, other: str, measure: str) -> list[tuple[float, float]]:
        """Returns a measure of two arms for each pair of results."""
        value = MEASURES[measure]
        return [(value(one), value(two)) for one, two in self.paired_results(part, model, arm, other)]

    def paired_results(self, part: str, model: str, arm: str, other: str) -> list[tuple[Result, Result]]:
        """Returns the results of two arms for each seed that both have.

        A seed whose two runs did not start from the same checkpoint is no pair: they measured different things before.
        """
        one, two = (self.of_arm(part, model, name) for name in (arm, other))
        return [(one[s], two[s]) for s in sorted(one.keys() & two.keys()) if one[s]["before"] == two[s]["before"]]

    def differences(self, part: str, model: str, arm: str, other: str, measure: str) -> list[float]:
        """Returns the paired differences of a measure, arm - other."""
        return [a - b for a, b in self.pairs(part, model, arm, other, measure)]

    def seeds_done(self, part: str, model: str) -> set[int]:
        """Returns the seeds of which no run of a model is missing; one that failed is not missing."""
        return self._done.get((part, model), set())

    def _seeds_done(self, part: str, model: str) -> set[int]:
        seeds = {run.seed for run in self.grid.runs() if (run.part, run.model) == (part, model)}
        return seeds - {int(name.rsplit("/", 1)[1]) for name in self.missing if name.startswith(f"{part}/{model}/")}

    def is_complete(self, claim: Hypothesis) -> bool:
        """Returns whether no run is missing of the seeds of a hypothesis."""
        planned = self.grid.main["runs"].get(claim.model, {})
        seeds = set(range(1, 1 + SEEDS))
        is_planned = all(planned.get(arm, 0) >= SEEDS for arm in (claim.arm, claim.other))
        return is_planned and seeds <= self.seeds_done(MAIN, claim.model)

    def price_of_pictures(self, model: str) -> float:
        """Returns the retention that `none` gains for each picture question more that it answers, usually below 0.

        The slope of a line through the means of `none` at the learning rates that were run, over the seeds that all of
        them have; NaN if there is one learning rate.
        """
        rates = [BASELINE, *(name for name in self.grid.main["runs"].get(model, {}) if name.startswith(FRONTIER))]
        by_rate = [self.of_arm(MAIN, model, name) for name in rates]
        seeds = set.intersection(*(set(own) for own in by_rate))
        if len(rates) < 2 or not seeds:
            return math.nan
        answered, kept = (
            [statistics.fmean(MEASURES[name](own[seed]) for seed in seeds) for own in by_rate]
            for name in ("pictures", "retention")
        )
        return statistics.linear_regression(answered, kept).slope

    def at_equal_pictures(self, model: str, arm: str) -> list[float]:
        """Returns each pair's retention minus that of `none` at a learning rate that answers as many questions.

        That is the difference in retention, minus what the difference in picture questions costs `none` when its
        learning rate changes.
        """
        price = self.price_of_pictures(model)
        kept, answered = (self.differences(MAIN, model, arm, BASELINE, name) for name in ("retention", "pictures"))
        return [] if math.isnan(price) else [a - price * b for a, b in zip(kept, answered, strict=True)]


def planned(results: Results) -> dict[str, Hypothesis]:
    """Returns the hypotheses both of whose arms are in the grid's main part."""
    runs = results.grid.main["runs"]
    return {name: h for name, h in HYPOTHESES.items() if {h.arm, h.other} <= runs.get(h.model, {}).keys()}


def verdicts(results: Results) -> dict[str, Verdict]:
    """Returns what the data says about every hypothesis whose runs are all done, so that nobody stops at half.

    Holm's correction counts all planned hypotheses, with a p value of 1 for those that have not all pairs.
    """
    complete = {name: claim for name, claim in planned(results).items() if results.is_complete(claim)}
    pairs = {name: results.differences(MAIN, h.model, h.arm, h.other, h.measure) for name, h in complete.items()}
    shifted = {name: [d + complete[name].sign * complete[name].margin for d in pairs[name]] for name in pairs}
    p_values = {name: sign_flip_p(found) if found else math.nan for name, found in shifted.items()}
    whole = {name for name, found in pairs.items() if len(found) == SEEDS}
    adjusted = holm({name: p_values[name] if name in whole else 1.0 for name in planned(results)})
    found = {}
    for name, claim in complete.items():
        pictures = summary(results.differences(MAIN, claim.model, claim.arm, claim.other, "pictures"))
        outcome = "undecided"
        if name in whole and adjusted[name] < SIGNIFICANT:
            outcome = _outcome(claim, statistics.fmean(shifted[name]) * claim.sign > 0, pictures)
        numbers = summary(pairs[name]), sampling_error(results, claim), pictures, len(pairs[name])
        found[name] = Verdict(*numbers, p_values[name], adjusted[name], outcome)
    return found


def sampling_error(results: Results, claim: Hypothesis) -> float:
    """Returns how far other passages of the same number would move a difference in retention, its 95 % half-width.

    A normal interval over passages of the mean over seeds of the words that one arm completes more than the other.
    """
    pairs = results.paired_results(MAIN, claim.model, claim.arm, claim.other)
    if claim.measure != "retention" or not pairs:
        return math.nan
    one, two = (np.array([pair[n]["after"]["words_completed"] for pair in pairs], float) for n in (0, 1))
    more = (one - two).mean(axis=0)  # [passages]
    before = statistics.fmean(sum(a["before"]["words_completed"]) for a, _ in pairs)
    return float(1.96 * more.std(ddof=1) * math.sqrt(more.size) / before)


def _outcome(claim: Hypothesis, agrees: bool, pictures: Interval) -> str:
    """Returns the outcome of a significant difference; a claim to keep more language must not learn less."""
    keeps_more = claim.measure == "retention" and claim.sign > 0
    if agrees and keeps_more and pictures.mean < -TOLERATED_LOSS:
        return "traded"
    return "supported" if agrees else "contradicted"


class Tried(NamedTuple):
    """A setting that the tuning tried, with the means over its seeds."""

    model: str
    arm: str
    setting: str
    retention: float
    perplexity: float
    pictures: float
    distance: float
    msi: float
    crossing: float
    seeds: int


def tried(results: Results) -> list[Tried]:
    """Returns the settings of the tuning, over the seeds of which a model has all runs, so that means compare."""
    found = []
    for model in results.grid.tuning["runs"]:
        for name in results.arms(TUNING, model):
            arm, _, setting = name.partition("__")
            own = list(results.of_arm(TUNING, model, name).values())
            means = {measure: statistics.fmean(map(MEASURES[measure], own)) for measure in Tried._fields[3:-1]}
            found.append(Tried(model, arm, setting, seeds=len(own), **means))
    return found


def choose(settings: Iterable[Tried], pictures_of_none: float) -> Tried:
    """Chooses a setting of one method by the design's rule.

    Args:
        settings: The settings of one flag of one method.
        pictures_of_none: The picture questions that `none` answers.

    Returns:
        The one that keeps most language among those that answer about as many picture questions as `none`; if there are
        none, the one that answers most.
    """
    settings = list(settings)
    learnt = [each for each in settings if each.pictures >= pictures_of_none - TOLERATED_LOSS]
    if not learnt:
        return max(settings, key=lambda each: each.pictures)
    return max(learnt, key=lambda each: each.retention)


def chosen(results: Results) -> list[Tried]:
    """Returns the settings that the design's rule chooses, for each model whose tuning is done."""
    seeds = len(results.grid.tuning["seeds"])
    whole = [each for each in tried(results) if each.seeds == seeds]  # a value that failed on a seed is not chosen
    pictures = {each.model: each.pictures for each in whole if (each.arm, each.setting) == (BASELINE, "")}
    groups: dict[tuple[str, str, str], list[Tried]] = defaultdict(list)
    for each in whole:
        groups[each.model, each.arm, each.setting.partition("_")[0]].append(each)
    return [
        choose(group, pictures[model])
        for (model, _, flag), group in groups.items()
        if flag and model in pictures and len(results.seeds_done(TUNING, model)) == seeds
    ]


def wrongly_chosen(results: Results) -> list[str]:
    """Returns the settings that the rule chooses and the grid's main part does not have."""
    values = {
        (model, tried_name(arm, changes)): changes
        for model, arms in results.grid.tuning["runs"].items()
        for arm, flags in arms.items()
        for changes in tried_settings(flags)
    }
    wrong = []
    for each in chosen(results):
        name = f"{each.arm}__{each.setting}"
        have = results.grid.main["chosen"].get(each.model, {}).get(each.arm, {})
        if not values[each.model, name].items() <= have.items():
            wrong.append(f"{each.model}/{name}")
    return wrong


def summary(values: Sequence[float]) -> Interval:
    """Returns the interval of a measure over seeds; NaN without any, or if one of them is."""
    if not values or any(map(math.isnan, values)):
        return Interval(math.nan, math.nan, math.nan)
    return interval(values)
