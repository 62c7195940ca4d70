"""Intervals against hand-computed and published values."""

import math

import pytest

from helpers import stats


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, method 3 (Wilson score): 0.2553 to 0.3662.
    interval = stats.proportion(81, 263)
    assert interval.estimate == pytest.approx(81 / 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_proportion_refuses_impossible_counts():
    with pytest.raises(ValueError):
        stats.proportion(3, 2)
    with pytest.raises(ValueError):
        stats.proportion(0, 0)


def test_mean_interval_by_hand():
    # 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, t(0.975, 3) = 3.182446
    interval = stats.mean([1, 2, 3, 4])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((2.5 - half, 2.5, 2.5 + half), rel=1e-6)


def test_mean_of_equal_values_and_of_one_value():
    assert stats.mean([2.0, 2.0, 2.0]).low == 2.0
    with pytest.raises(ValueError, match="at least two"):
        stats.mean([1.0])


def test_paired_difference_is_the_mean_of_differences():
    interval = stats.paired_difference([3, 5, 9], [1, 2, 3])
    assert interval == stats.mean([2, 3, 6])
    with pytest.raises(ValueError):
        stats.paired_difference([1, 2], [1])


def test_mcnemar_by_hand():
    # 8 pairs differ, 1 of them for the first: 2 * (C(8,0) + C(8,1)) / 2^8
    first, second = [1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]
    assert stats.mcnemar(first, second) == pytest.approx(2 * 9 / 256)
    assert stats.mcnemar([True, False], [True, False]) == 1
    assert stats.mcnemar([1, 0], [0, 1]) == 1
    with pytest.raises(ValueError):
        stats.mcnemar([1], [1, 0])
