"""Confidence intervals and paired tests, a thin layer over scipy, and the value that a notebook records.

Use ``proportion`` for right answers out of many, ``mean`` and ``ratio`` for measured values, ``mcnemar`` and
``paired_difference`` for two models on the same questions. Every interval has 95% confidence unless another is given.
A value that is not finite is refused with WorkbookError: a sum would hide where it came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from helpers.base.errors import WorkbookError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

_MOST_NATS = 700.0  # e to a little more overflows; a model that guesses has about 11
_RESAMPLES = 9999  # scipy's default: the percentiles then move by about a hundredth of the interval's width


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. Raises WorkbookError if one of the three is not finite."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        check_finite((self.estimate, self.low, self.high), "the estimate and its interval")


class _Scalar(Protocol):
    """A number of numpy or torch."""

    def item(self) -> object: ...


Recordable: TypeAlias = bool | int | float | str | _Scalar


@dataclass(frozen=True)
class Measured:
    """A value to record with what is known about it; ``helpers.runs.record`` says what the fields mean."""

    value: Recordable
    unit: str = ""
    claim: str | None = None
    tolerance: float | None = None
    agrees: bool | None = None
    model: str | None = None


def known(value: float, missing: str, digits: int | None = None) -> float | str:
    """The value, rounded to ``digits``; if it is not finite, ``missing``, which says why there is none.

    A run records either: a model that answers nothing has no speed, and that is a finding, not an error.
    """
    if not math.isfinite(value):
        return missing
    return value if digits is None else round(value, digits)


def exp(nats: float) -> float:
    """e to the power of a loss in nats, a perplexity. Raises WorkbookError if that is more than a float holds."""
    if not nats < _MOST_NATS:
        raise WorkbookError(
            f"The loss is {nats:.3g} nats per token, too much for a perplexity. Check the model's files."
        )
    return math.exp(nats)


def check_finite(values: Sequence[float], what: str) -> None:
    """Raise WorkbookError that names the first value that is not finite."""
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise WorkbookError(
                f"Value {number} of {what} is {value}. Statistics need finite numbers: find where it arose."
            )


def _floats(values: Sequence[float], what: str) -> list[float]:
    """The values as Python's floats, all finite: numpy's small integers overflow, its bools do not subtract.

    Raises WorkbookError as ``check_finite`` does.
    """
    numbers = [float(value) for value in values]
    check_finite(numbers, what)
    return numbers


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise WorkbookError(f"The confidence must be between 0 and 1, such as 0.95, but is {confidence}.")


def proportion(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval (Wilson 1927, ``scipy.stats.binomtest``).

    Raises ValueError when ``trials`` is 0 or ``successes`` is not in [0, trials].
    """
    from scipy.stats import binomtest

    _check_confidence(confidence)
    check_finite((successes, trials), "a proportion")
    if successes != int(successes) or trials != int(trials):
        raise WorkbookError(f"A proportion needs whole numbers, but there are {successes} of {trials}.")
    successes, trials = int(successes), int(trials)
    test = binomtest(successes, trials)
    interval = test.proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(interval.low), float(interval.high), confidence)


def mean(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with its Student-t interval; if all values are 0, or all are 1, the interval of ``proportion``.

    Raises ValueError for fewer than two values.
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        raise ValueError("An interval of the mean needs at least two values.")
    _check_confidence(confidence)
    numbers = _floats(values, "the mean")
    if set(numbers) in ({0}, {1}):
        # Right or wrong, and all alike: Student's t would be sure after two of them.
        return proportion(round(sum(numbers)), len(numbers), confidence)
    centre, error = float(np.mean(numbers)), float(stats.sem(numbers))
    # With a scale of 0, scipy would return nan for both ends.
    if error == 0:
        return Interval(centre, centre, centre, confidence)
    low, high = stats.t.interval(confidence, len(numbers) - 1, loc=centre, scale=error)
    return Interval(centre, float(low), float(high), confidence)


def discordant_pairs(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """How many pairs only the first got right, and how many only the second.

    Raises ValueError when the lengths differ, WorkbookError for an outcome that is neither right nor wrong.
    """
    only_first = only_second = 0
    for first_right, second_right in zip(first, second, strict=True):
        # NaN would count as right.
        if first_right not in (0, 1) or second_right not in (0, 1):
            raise WorkbookError(
                f"An outcome is right or wrong, but one pair is {first_right} and {second_right}. Give True or False."
            )
        if first_right and not second_right:
            only_first += 1
        elif second_right and not first_right:
            only_second += 1
    return only_first, only_second


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """p-value of the exact two-sided McNemar test over paired outcomes (McNemar 1947; ``scipy.stats.binomtest``).

    If the two were equally good, each would be the right one in half of the pairs that differ. 1.0 if none differs.
    Raises ValueError when the lengths differ.
    """
    from scipy.stats import binomtest

    only_first, only_second = discordant_pairs(first, second)
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    return float(binomtest(only_first, differing).pvalue)


def ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95) -> Interval:
    """Sum over sum, such as bits per byte over texts of unequal length, with its Student-t interval over the pairs.

    The error is the ratio estimator's (Cochran 1977, Sampling Techniques, 6.4). Raises ValueError as ``ratio_error``.
    """
    from scipy import stats

    _check_confidence(confidence)
    error = ratio_error(numerators, denominators)
    estimate = sum(map(float, numerators)) / sum(map(float, denominators))
    half = float(stats.t.ppf((1 + confidence) / 2, len(numerators) - 1)) * error
    return Interval(estimate, estimate - half, estimate + half, confidence)


def ratio_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The standard error of sum over sum: sqrt(n / (n - 1) * sum of squared (x - ratio * y)) / sum of y.

    Raises ValueError when the lengths differ or fewer than two pairs are given.
    """
    import numpy as np

    if len(numerators) != len(denominators) or len(numerators) < 2:
        raise ValueError("The error of a ratio needs at least two pairs.")
    x = np.asarray(_floats(numerators, "the numerators"))
    y = np.asarray(_floats(denominators, "the denominators"))
    if y.sum() <= 0:
        raise WorkbookError("The denominators sum to 0, so there is no ratio. Give pairs with something to divide by.")
    rest = x - x.sum() / y.sum() * y
    return float(np.sqrt(len(x) / (len(x) - 1) * (rest**2).sum()) / y.sum())


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Sum of first minus second over the sum of weights; without weights, the mean difference.

    The interval is a percentile bootstrap over the pairs (``scipy.stats.bootstrap``), the same for the same seed. It
    holds for means and for ratios of sums, and never leaves the range of the differences. If few pairs differ, or all
    do, a bootstrap has nothing to draw: two lists of outcomes (0 or 1, no weights other than 1) get the score interval
    of Tango (1998, Statistics in Medicine 17:891). Outcomes that differ in no pair get that of Clopper and Pearson for
    the share of pairs that would differ, in both directions: no difference can exceed it.
    Raises ValueError when the lengths differ or fewer than two pairs are given.
    """
    _check_confidence(confidence)
    left, right = _floats(first, "the first side"), _floats(second, "the second side")
    differences = [value - other for value, other in zip(left, right, strict=True)]
    sizes = [1.0] * len(differences) if weights is None else _floats(weights, "the weights")
    if len(differences) < 2 or len(sizes) != len(differences):
        raise ValueError("A paired difference needs at least two pairs, and a weight for each of them.")
    if min(sizes) < 0 or sum(sizes) <= 0:
        raise WorkbookError("The weights must be 0 or more, and not all 0. Give at least one pair a weight.")
    estimate = sum(differences) / sum(sizes)
    if {*left, *right} <= {0, 1} and set(sizes) == {1}:
        return Interval(estimate, *_of_outcomes(differences, confidence), confidence)
    return Interval(estimate, *_bootstrapped(differences, sizes, confidence, seed), confidence)


def _of_outcomes(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """The ends of the interval for the mean of differences of outcomes, each -1, 0 or 1."""
    if any(differences):
        return _tango(differences.count(1), differences.count(-1), len(differences), confidence)
    most = _bound_without_success(len(differences), confidence)
    return -most, most


def _bootstrapped(
    differences: Sequence[float], weights: Sequence[float], confidence: float, seed: int
) -> tuple[float, float]:
    """The percentiles of the quotient of sums over resampled pairs."""
    import numpy as np
    from scipy import stats

    def quotient(drawn: NDArray[np.float64], drawn_weight: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        quotients: NDArray[np.float64] = drawn.sum(axis) / drawn_weight.sum(axis)
        return quotients

    interval = stats.bootstrap(
        (np.array(differences, float), np.array(weights, float)),
        quotient,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=100,  # all resamples at once would take gigabytes for a benchmark of many thousand items
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _tango(only_first: int, only_second: int, pairs: int, confidence: float) -> tuple[float, float]:
    """The differences of two paired proportions that the score test does not reject (Tango 1998)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    critical = float(norm.ppf((1 + confidence) / 2))
    estimate = (only_first - only_second) / pairs

    def score(difference: float) -> float:
        # The likeliest share of pairs that only the second gets right, if this were the difference: a root of
        # a x² + b x + c. The variance of the estimate follows from both.
        a = 2 * pairs
        b = -only_first - only_second + (2 * pairs - only_first + only_second) * difference
        c = -only_second * difference * (1 - difference)
        share = (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)
        variance = pairs * (2 * share + difference * (1 - difference))
        distance = pairs * (estimate - difference)
        if distance == 0:
            return 0.0
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    edge = 1e-9  # at exactly -1 and 1 the variance is 0
    low, high = -1.0, 1.0
    if estimate > -1:
        low = float(brentq(lambda d: min(score(d), 1e9) - critical, -1 + edge, estimate))
    if estimate < 1:
        high = float(brentq(lambda d: max(score(d), -1e9) + critical, estimate, 1 - edge))
    return low, high


def _bound_without_success(trials: int, confidence: float) -> float:
    """Upper confidence bound of a proportion when none of ``trials`` succeeded (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    return float(binomtest(0, trials).proportion_ci(confidence, method="exact").high)
