"""Exercises of notebook 04: the scoring rule, Wilson's interval, McNemar's test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.verdict import _is_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.exercises.verdict import Check, Hint


def _is_right(function: Callable[[str, list[str], list[str]], bool]) -> Hint:
    cases = [
        ("A goat.", ["goat"], ["saddle"], True),
        ("The goat, not the saddle", ["goat"], ["saddle"], False),
        ("GOAT, swan", ["swan", "goat"], ["kettle"], True),
        ("Goat", ["goat", "swan"], ["kettle"], False),
        ("A scapegoat", ["goat"], ["saddle"], False),
        ("", ["yes"], ["no"], False),
        ("Yes, I know.", ["yes"], ["no"], True),
    ]
    for text, answer, others, expected in cases:
        if bool(function(text, list(answer), list(others))) is not expected:
            return f"{text!r} with answer {answer} and others {others} should be {expected}. Compare whole words."
    return None


def _wilson(function: Callable[[int, int], tuple[float, float]]) -> Hint:
    from helpers.base.stats import proportion

    # None and all passed are among the cases: the simple formula gives an interval of no width there.
    for passed, trials in ((63, 168), (0, 20), (7, 7), (1, 1000)):
        expected = proportion(passed, trials)
        low, high = function(passed, trials)
        if abs(low - expected.low) > 1e-3 or abs(high - expected.high) > 1e-3:
            right, given = f"{expected.low:.4f} to {expected.high:.4f}", f"{low:.4f} to {high:.4f}"
            return f"For {passed} of {trials} the interval is {right}, by scipy, but yours is {given}."
    return None


def _p_value(function: Callable[[int, int], float]) -> Hint:
    from scipy.stats import binomtest

    for first, second in ((0, 5), (3, 9), (10, 10), (40, 22), (1, 0)):
        expected = float(binomtest(first, first + second).pvalue)
        if not _is_close(function(first, second), expected, 1e-6):
            return (
                f"For a split of {first} to {second} the p-value is {expected:.6f}, by scipy. "
                "Both directions count; at most 1."
            )
    return None


CHECKS: dict[str, Check] = {"04-1": _is_right, "04-2": _wilson, "04-3": _p_value}
