"""Intervals and paired tests, thin over scipy."""

from __future__ import annotations

from collections.abc import Sequence

from helpers.types import Interval


def proportion(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval (Wilson 1927, ``scipy.stats.binomtest``).

    Raises ValueError when ``trials`` is 0 or ``successes`` is not in [0, trials].
    """
    from scipy.stats import binomtest

    test = binomtest(successes, trials)
    interval = test.proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(interval.low), float(interval.high), confidence)


def mean(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with its Student-t interval. Raises ValueError for fewer than two values."""
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        raise ValueError("an interval of the mean needs at least two values")
    centre, error = float(np.mean(values)), stats.sem(values)
    if error == 0:
        return Interval(centre, centre, centre, confidence)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=centre, scale=error)
    return Interval(centre, float(low), float(high), confidence)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of first minus second over the same items, with its Student-t interval.

    Raises ValueError when the lengths differ or fewer than two pairs are given.
    """
    return mean([a - b for a, b in zip(first, second, strict=True)], confidence)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """p-value of the exact two-sided McNemar test over paired outcomes (McNemar 1947; ``scipy.stats.binomtest``).

    Of the pairs that differ, half should favour each side if the two were equally good; 1.0 where none differs.
    Raises ValueError when the lengths differ.
    """
    from scipy.stats import binomtest

    differing = [bool(a) for a, b in zip(first, second, strict=True) if bool(a) != bool(b)]
    return float(binomtest(sum(differing), len(differing)).pvalue) if differing else 1.0
