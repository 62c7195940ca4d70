"""Intervals against hand-computed and published values."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from helpers import base


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, method 3 (Wilson score): 0.2553 to 0.3662.
    interval = base.proportion(81, 263)
    assert interval.estimate == pytest.approx(81 / 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_proportion_refuses_impossible_counts():
    with pytest.raises(ValueError):
        base.proportion(3, 2)
    with pytest.raises(ValueError):
        base.proportion(0, 0)


def test_mean_interval_by_hand():
    # 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, t(0.975, 3) = 3.182446
    interval = base.mean([1, 2, 3, 4])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((2.5 - half, 2.5, 2.5 + half), rel=1e-6)


def test_mean_of_equal_values_and_of_one_value():
    assert base.mean([2.0, 2.0, 2.0]).low == 2.0
    with pytest.raises(ValueError, match="at least two"):
        base.mean([1.0])


def test_discordant_pairs_are_those_that_only_one_got_right():
    assert base.discordant_pairs([True, True, False, False, True], [True, False, True, False, False]) == (2, 1)
    with pytest.raises(ValueError):
        base.discordant_pairs([True, True], [True])


def test_mcnemar_by_hand():
    # 8 pairs differ, 1 of them for the first: 2 * (C(8,0) + C(8,1)) / 2^8
    first, second = [1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]
    assert base.mcnemar(first, second) == pytest.approx(2 * 9 / 256)
    assert base.mcnemar([True, False], [True, False]) == 1
    assert base.mcnemar([1, 0], [0, 1]) == 1
    with pytest.raises(ValueError):
        base.mcnemar([1], [1, 0])


def test_ratio_by_hand():
    # 2/1, 3/2, 7/3: sum 12/6 = 2; rests 0, -1, 1: error sqrt(3/2 * 2) / 6; t(0.975, 2) = 4.302653
    error = math.sqrt(3) / 6
    assert base.ratio_error([2, 3, 7], [1, 2, 3]) == pytest.approx(error)
    found = base.ratio([2, 3, 7], [1, 2, 3])
    assert (found.low, found.estimate, found.high) == pytest.approx((2 - 4.302653 * error, 2, 2 + 4.302653 * error))


def test_ratio_over_equal_denominators_is_the_mean():
    values = [1.0, 2.5, 4.0, 9.0]
    found, mean = base.ratio(values, [1] * 4), base.mean(values)
    assert (found.low, found.estimate, found.high) == pytest.approx((mean.low, mean.estimate, mean.high))


def test_ratio_refuses_one_pair_and_uneven_lengths():
    for values in (([1], [1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="two pairs"):
            base.ratio(*values)


def test_the_bootstrap_draws_what_all_draws_by_hand_give():
    # three pairs drawn three times: 27 draws of (d, w); the quotients' percentiles are those of the full list
    differences, weights = [1.0, 0.0, -1.0], [1.0, 2.0, 1.0]
    draws = list(itertools.product(range(3), repeat=3))
    every = [sum(differences[i] for i in draw) / sum(weights[i] for i in draw) for draw in draws]
    found = base.paired_difference([2, 2, 2], [1, 2, 3], weights, confidence=0.8)
    assert found.estimate == 0
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.1, 0.9])))


def test_the_bootstrap_agrees_with_students_t_on_many_pairs():
    rng = np.random.default_rng(0)
    first = rng.normal(1, 1, 400)
    second = first - rng.normal(0.3, 0.5, 400)
    found, student = base.paired_difference(first, second), base.mean(first - second)
    assert found.estimate == pytest.approx(student.estimate)
    assert (found.low, found.high) == pytest.approx((student.low, student.high), abs=0.005)
    assert found == base.paired_difference(first, second)
    assert found != base.paired_difference(first, second, seed=1)


def test_no_difference_in_measured_values_is_a_point():
    found = base.paired_difference([1, 0.5, 1], [1, 0.5, 1])
    assert (found.low, found.estimate, found.high) == (0, 0, 0)
    found = base.paired_difference([1, 0, 1], [1, 0, 1], [2, 2, 2])  # sums over texts, not right and wrong
    assert (found.low, found.estimate, found.high) == (0, 0, 0)


def test_outcomes_that_never_differ_leave_less_than_four_over_their_number():
    # Clopper and Pearson: (1 - p)^n = 0.025
    most = 1 - 0.025 ** (1 / 100)
    found = base.paired_difference([1, 0] * 50, [1, 0] * 50)
    assert (found.low, found.estimate, found.high) == pytest.approx((-most, 0, most))
    assert most < 4 / 100


def likeliest(only_first, only_second, pairs, difference):
    """The share of pairs that only the second gets right, by searching for the most likely one."""
    tied = pairs - only_first - only_second

    def unlikelihood(share):
        return -sum(
            count * math.log(chance) if count else 0
            for count, chance in (
                (only_first, share + difference), (only_second, share), (tied, 1 - 2 * share - difference),
            )
        )  # fmt: skip

    low, high = max(0, -difference), (1 - difference) / 2
    return minimize_scalar(unlikelihood, (low, high), bounds=(low + 1e-12, high - 1e-12), method="bounded").x


@pytest.mark.parametrize("counts", [(12, 2, 56), (4, 1, 10), (3, 1, 20), (9, 1, 10), (1, 1, 12)])
def test_the_score_interval_ends_where_the_score_test_rejects(counts):
    """B3: Tango 1998. (b - c - n d)² / (n (2 q + d (1 - d))) is 1.96² at both ends, q by numerical search."""
    only_first, only_second, pairs = counts
    tied = [1] * (pairs - only_first - only_second)
    first, second = [1] * only_first + [0] * only_second + tied, [0] * only_first + [1] * only_second + tied
    found = base.paired_difference(first, second)
    assert found.low < found.estimate < found.high
    for end in (found.low, found.high):
        share = likeliest(only_first, only_second, pairs, end)
        variance = pairs * (2 * share + end * (1 - end))
        assert (only_first - only_second - pairs * end) ** 2 / variance == pytest.approx(1.96**2, rel=1e-3)


@pytest.mark.parametrize("pairs", [2, 12, 100])
def test_outcomes_that_all_differ_leave_a_width(pairs):
    """B3: only the first is right, every time. By hand: the score test, q = (1 - d) / 2, ends at 1 - 2z²/(n + z²)."""
    low = 1 - 2 * 1.959964**2 / (pairs + 1.959964**2)
    found = base.paired_difference([1] * pairs, [0] * pairs)
    assert (found.low, found.estimate, found.high) == pytest.approx((low, 1, 1), abs=1e-4)
    found = base.paired_difference([0] * pairs, [1] * pairs)
    assert (found.low, found.estimate, found.high) == pytest.approx((-1, -1, -low), abs=1e-4)


@pytest.mark.parametrize("value", [0, 1])
def test_the_mean_of_outcomes_that_are_all_alike_leaves_a_width(value):
    """B3: Student's t would give a point; Wilson's interval at 0 or 12 of 12 is z²/(n + z²) wide."""
    found = base.mean([value] * 12)
    assert found.high - found.low == pytest.approx(1.959964**2 / (12 + 1.959964**2))
    assert found.estimate == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "ask",
    [
        lambda bad: base.mean([1.0, bad]),
        lambda bad: base.ratio([1.0, bad], [1.0, 2.0]),
        lambda bad: base.ratio([1.0, 2.0], [1.0, bad]),
        lambda bad: base.ratio_error([1.0, bad], [1.0, 2.0]),
        lambda bad: base.paired_difference([1.0, bad], [1.0, 2.0]),
        lambda bad: base.paired_difference([1.0, 2.0], [1.0, bad]),
        lambda bad: base.paired_difference([1.0, 2.0], [1.0, 3.0], [1.0, bad]),
        lambda bad: base.Interval(0.5, bad, 1.0),
    ],
)
def test_no_statistic_takes_a_value_that_is_not_finite(ask, bad):
    """B1: McNemar's p was 1.0 and the accuracy 0.5 of a model that computed NaN."""
    with pytest.raises(base.WorkbookError, match=str(bad)):
        ask(bad)


def test_a_value_or_why_there_is_none():
    """B4"""
    assert base.known(3.14159, "no time", 2) == 3.14
    assert base.known(2.0, "no time") == 2.0
    assert base.known(math.nan, "no time", 2) == "no time"
    assert base.known(math.inf, "no time") == "no time"


def test_a_paired_difference_refuses_what_has_no_pairs():
    for values in (([1], [1]), ([1, 2], [1]), ([1, 2], [1, 2], [1])):
        with pytest.raises(ValueError):
            base.paired_difference(*values)
