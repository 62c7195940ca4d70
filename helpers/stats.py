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


def ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95) -> Interval:
    """Sum over sum, such as bits per byte over texts of unequal length, with its Student-t interval over the pairs.

    The error is the ratio estimator's (Cochran 1977, Sampling Techniques, 6.4). Raises ValueError as ``ratio_error``.
    """
    from scipy import stats

    error, estimate = ratio_error(numerators, denominators), sum(numerators) / sum(denominators)
    half = float(stats.t.ppf((1 + confidence) / 2, len(numerators) - 1)) * error
    return Interval(estimate, estimate - half, estimate + half, confidence)


def ratio_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The standard error of sum over sum: sqrt(n / (n - 1) * sum of squared (x - ratio * y)) / sum of y.

    Raises ValueError when the lengths differ or fewer than two pairs are given.
    """
    import numpy as np

    if len(numerators) != len(denominators) or len(numerators) < 2:
        raise ValueError("the error of a ratio needs at least two pairs")
    x, y = np.asarray(numerators, float), np.asarray(denominators, float)
    rest = x - x.sum() / y.sum() * y
    return float(np.sqrt(len(x) / (len(x) - 1) * (rest**2).sum()) / y.sum())


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Sum of first minus second over the sum of weights, by default the mean difference; items are drawn as wholes.

    The interval is the bootstrap's percentiles (``scipy.stats.bootstrap``), the same for the same seed.
    Raises ValueError when the lengths differ or fewer than two pairs are given.
    """
    import numpy as np
    from scipy import stats

    difference = np.array([a - b for a, b in zip(first, second, strict=True)], float)
    weight = np.ones(len(difference)) if weights is None else np.asarray(weights, float)
    if len(difference) < 2 or len(weight) != len(difference):
        raise ValueError("a bootstrap needs at least two pairs, and as many weights")
    found = stats.bootstrap(
        (difference, weight),
        lambda d, w, axis: d.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=100,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(difference.sum() / weight.sum()), float(found.low), float(found.high), confidence)


def most_without_one(trials: int, confidence: float = 0.95) -> float:
    """The largest share that none of so many trials leaves possible (Clopper and Pearson 1934, upper end at 0)."""
    from scipy.stats import binomtest

    return float(binomtest(0, trials).proportion_ci(confidence, method="exact").high)
