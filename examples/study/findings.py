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
from grid import MAIN, TUNING, Grid, Run
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
        adjusted: The same after Holm's correction over all hypotheses; 1 for an incomplete one.
        outcome: `supported`, `contradicted` or `undecided`; `traded` if the language that is kept is paid for with more
            picture questions than tolerated; `incomplete` while runs are missing.
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

    Args:
        grid: The grid.
        folder: Folder of the results.

    Attributes:
        found: The result of each run that succeeded.
        failed: What the runs that failed said, by the run's name.
        missing: Names of the runs without a result, or with one from other settings.
        codes: Number of results by the hash of the code that made them.
        unpaired: Models and seeds whose arms did not start from the same checkpoint.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid = grid
        self.found: dict[Run, Result] = {}
        self.failed: dict[str, str] = {}
        self.missing: list[str] = []
        self.codes: Counter[str] = Counter()
        starts: dict[tuple[str, str, int], set[str]] = defaultdict(set)
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
        self.unpaired = [f"{'/'.join(map(str, start))}" for start, measured in starts.items() if len(measured) > 1]

    def arms(self, part: str, model: str) -> list[str]:
        """Returns the arms that have results, in the order of the grid."""
        return list(dict.fromkeys(run.arm for run in self.found if (run.part, run.model) == (part, model)))

    def of_arm(self, part: str, model: str, arm: str) -> dict[int, Result]:
        """Returns the results of an arm by seed."""
        return {r.seed: found for r, found in self.found.items() if (r.part, r.model, r.arm) == (part, model, arm)}

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
        """Returns the seeds of which no run of a model is missing."""
        seeds = {run.seed for run in self.grid.runs() if (run.part, run.model) == (part, model)}
        return seeds - {int(name.rsplit("/", 1)[1]) for name in self.missing if name.startswith(f"{part}/{model}/")}

    def is_missing(self, model: str, arm: str, seeds: int) -> bool:
        """Returns whether any of an arm's runs of the main part has no result yet; one that failed has."""
        done = {run.name for run in self.found} | self.failed.keys()
        return any(f"{MAIN}/{model}/{arm}/{seed}" not in done for seed in range(1, 1 + seeds))

    def at_equal_pictures(self, model: str, arm: str) -> list[float]:
        """Returns each seed's retention minus that of `none` at the learning rate that answers as many questions.

        Between the learning rates that were run it is interpolated. An arm that answers more questions than `none` at
        any of them is compared with the one that answers most; a seed in which it answers fewer is left out.
        """
        rates = [BASELINE, *(name for name in self.grid.main["runs"].get(model, {}) if name.startswith(FRONTIER))]
        by_rate = [self.of_arm(MAIN, model, name) for name in rates]
        found = []
        for seed, result in self.of_arm(MAIN, model, arm).items():
            same = [own[seed] for own in by_rate if seed in own and own[seed]["before"] == result["before"]]
            curve = sorted((MEASURES["pictures"](each), MEASURES["retention"](each)) for each in same)
            answered = MEASURES["pictures"](result)
            if len(same) == len(rates) > 1 and answered >= curve[0][0]:
                expected = np.interp(answered, *np.transpose(curve))
                found.append(MEASURES["retention"](result) - float(expected))
        return found


def verdicts(results: Results) -> dict[str, Verdict]:
    """Returns what the data says about every hypothesis that has at least two pairs, or whose runs are all done.

    An outcome is given when all runs are done, so that nobody stops at a result that pleases. Holm's correction counts
    all hypotheses, with a p value of 1 for those that are incomplete.
    """
    pairs = {name: results.differences(MAIN, h.model, h.arm, h.other, h.measure) for name, h in HYPOTHESES.items()}
    tested = {name: found for name, found in pairs.items() if len(found) > 1}
    shifted = {name: [d + HYPOTHESES[name].sign * HYPOTHESES[name].margin for d in tested[name]] for name in tested}
    p_values = {name: sign_flip_p(found) for name, found in shifted.items()}
    complete = {name for name, claim in HYPOTHESES.items() if not _is_incomplete(results, claim)}
    adjusted = holm({name: p_values.get(name, 1.0) if name in complete else 1.0 for name in HYPOTHESES})
    found = {}
    for name in complete | tested.keys():
        claim, differences = HYPOTHESES[name], pairs[name]
        pictures = summary(results.differences(MAIN, claim.model, claim.arm, claim.other, "pictures"))
        outcome = "undecided" if name in complete else "incomplete"
        if name in complete and adjusted[name] < SIGNIFICANT and len(differences) == SEEDS:
            outcome = _outcome(claim, statistics.fmean(shifted[name]) * claim.sign > 0, pictures)
        numbers = summary(differences), sampling_error(results, claim), pictures, len(differences)
        found[name] = Verdict(*numbers, p_values.get(name, math.nan), adjusted[name], outcome)
    return dict(sorted(found.items()))


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


def _is_incomplete(results: Results, claim: Hypothesis) -> bool:
    return any(results.is_missing(claim.model, arm, SEEDS) for arm in (claim.arm, claim.other))


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
    seeds: int


def tried(results: Results) -> list[Tried]:
    """Returns the settings of the tuning, over the seeds of which a model has all runs, so that means compare."""
    found = []
    for model in results.grid.tuning["runs"]:
        seeds = results.seeds_done(TUNING, model)
        for name in results.arms(TUNING, model):
            arm, _, setting = name.partition("__")
            own = [result for seed, result in results.of_arm(TUNING, model, name).items() if seed in seeds]
            if own:
                means = {name: statistics.fmean(map(MEASURES[name], own)) for name in Tried._fields[3:6]}
                found.append(Tried(model, arm, setting.replace("_", " "), seeds=len(own), **means))
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


def summary(values: Sequence[float]) -> Interval:
    """Returns the interval of a measure over seeds; NaN without any, or if one of them is."""
    if not values or any(map(math.isnan, values)):
        return Interval(math.nan, math.nan, math.nan)
    return interval(values)
