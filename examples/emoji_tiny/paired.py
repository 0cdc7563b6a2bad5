# SPDX-License-Identifier: Apache-2.0
"""Statistics of paired differences over seeds: t intervals, the exact sign-flip test, Holm's correction."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t

LEVEL = 0.95
MOST_FLIPS = 20  # 2^20 patterns of signs take about a second


class Interval(NamedTuple):
    """A mean over seeds and its t interval, whose ends are NaN for a single seed."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the mean and its two-sided t interval.

    Args:
        values: One value per seed, at least one.
        level: Share of such intervals that contain the true mean, for normally distributed values.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    if not values:
        raise ValueError("an interval needs at least one value.")
    _check_finite(values)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the exact two-sided p value of the hypothesis that the differences are symmetric about 0.

    It is the share of the 2^n patterns of signs whose sum is at least as far from 0 as the observed one.

    Args:
        differences: One paired difference per seed, 1 to 20 of them.

    Raises:
        ValueError: There are none, or too many to try all patterns; or one is not finite.
    """
    if not 1 <= len(differences) <= MOST_FLIPS:
        raise ValueError(f"{len(differences)} differences: the exact test takes 1 to {MOST_FLIPS}.")
    _check_finite(differences)
    sizes = [abs(value) for value in differences]
    # Sums of the same numbers in another order differ in the last bits; such a pattern is as far from 0.
    observed = abs(math.fsum(differences)) - 1e-9 * math.fsum(sizes)
    flips = itertools.product((1, -1), repeat=len(sizes))
    extreme = sum(abs(math.fsum(s * v for s, v in zip(signs, sizes, strict=True))) >= observed for signs in flips)
    return float(extreme / 2 ** len(sizes))


def _check_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{list(values)} has a value that is not finite: leave the seed out, and say so.")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns Holm's adjusted p values, which bound the probability of any false rejection among them."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
