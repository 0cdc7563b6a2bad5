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

from grid import MAIN, TUNING, Grid, Run
from paired import Interval, holm, interval, sign_flip_p

Result = Mapping[str, Any]
SIGNIFICANT = 0.05
TOLERATED_LOSS = 0.02  # of picture questions, in the rule that chooses coefficients
BASELINE = "none"


def _mean_after(name: str) -> Callable[[Result], float]:
    return lambda result: statistics.fmean(result["after"][name])


MEASURES: dict[str, Callable[[Result], float]] = {
    "retention": lambda r: r["after"]["word_accuracy"] / r["before"]["word_accuracy"],
    "perplexity": lambda r: r["after"]["text_perplexity"] / r["before"]["text_perplexity"],
    "pictures": lambda r: r["after"]["vqa_accuracy"],
    "msi": _mean_after("msi"),
    "distance": _mean_after("mrd_distance"),
    "entropy": _mean_after("load_entropy"),
    "crossing": lambda r: r["after"]["crossing"]["after"],
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
        margin: Added to the difference in the direction of the claim: above 0 for a claim of non-inferiority.
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
    "H3": Hypothesis("a low band collapses the routing", "large", "smar_05", "smar", "entropy", -1),
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
        seeds: Number of pairs.
        p: The exact two-sided p value, of the difference with the margin.
        adjusted: The same after Holm's correction over all hypotheses.
        outcome: `supported`, `contradicted` or `undecided`; `incomplete` until all pairs of the grid are there.
    """

    difference: Interval
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
        """Returns a measure of two arms for each seed that both have.

        A seed whose two runs did not start from the same checkpoint is no pair: they measured different things before.
        """
        one, two = (self.of_arm(part, model, name) for name in (arm, other))
        found = [(one[s], two[s]) for s in sorted(one.keys() & two.keys()) if one[s]["before"] == two[s]["before"]]
        return [(MEASURES[measure](a), MEASURES[measure](b)) for a, b in found]

    def differences(self, part: str, model: str, arm: str, other: str, measure: str) -> list[float]:
        """Returns the paired differences of a measure, arm - other."""
        return [a - b for a, b in self.pairs(part, model, arm, other, measure)]


def verdicts(results: Results) -> dict[str, Verdict]:
    """Returns what the data says about every hypothesis that has at least two pairs.

    An outcome is given when all pairs of the grid are there, so that nobody stops at a result that pleases. Holm's
    correction counts all hypotheses, also those without data yet.
    """
    pairs = {name: results.differences(MAIN, h.model, h.arm, h.other, h.measure) for name, h in HYPOTHESES.items()}
    tested = {name: found for name, found in pairs.items() if len(found) > 1}
    shifted = {name: [d + HYPOTHESES[name].sign * HYPOTHESES[name].margin for d in tested[name]] for name in tested}
    p_values = {name: sign_flip_p(shifted[name]) if name in tested else 1.0 for name in HYPOTHESES}
    adjusted = holm(p_values)
    found = {}
    for name, differences in tested.items():
        agrees = statistics.fmean(shifted[name]) * HYPOTHESES[name].sign > 0
        decided = "supported" if agrees else "contradicted"
        outcome = decided if adjusted[name] < SIGNIFICANT else "undecided"
        wanted = min(results.grid.seeds_of(HYPOTHESES[name].model, arm) for arm in HYPOTHESES[name][2:4])
        if len(differences) < wanted:
            outcome = "incomplete"
        found[name] = Verdict(interval(differences), len(differences), p_values[name], adjusted[name], outcome)
    return found


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
    """Returns the settings of the tuning that have results."""
    found = []
    for model in results.grid.tuning["runs"]:
        for name in results.arms(TUNING, model):
            arm, _, setting = name.partition("__")
            means = [statistics.fmean(results.values(TUNING, model, name, m).values()) for m in Tried._fields[3:6]]
            found.append(Tried(model, arm, setting.replace("_", " "), *means, len(results.of_arm(TUNING, model, name))))
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
    """Returns the interval of a measure over seeds; NaN without any."""
    return interval(values) if values else Interval(math.nan, math.nan, math.nan)
