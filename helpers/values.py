"""Recorded values: how they are shown, and when two are the same."""

from __future__ import annotations

from typing import TypeGuard

from helpers.schema import Value

FLOAT_FLOOR = 0.01  # another CPU rounds differently: floats are never expected closer than 1%
_TIME_UNITS = frozenset({"s", "ms", "µs", "us", "min", "h", "seconds", "minutes", "hours"})
_ROUNDING = 1e-9


def format_value(value: Value | None) -> str:
    """Format a value for people: thousands separated, floats to six significant digits, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.6g}"


def with_unit(value: Value | None, unit: str) -> str:
    """Format a value followed by its unit, if it has one."""
    if value is None:
        return format_value(value)
    return f"{format_value(value)} {unit}".rstrip()


def with_tolerance(value: Value | None, tolerance: float | None, unit: str) -> str:
    """Format an expected value with its tolerance, if it has one."""
    margin = f" ± {tolerance:,.3g}" if tolerance else ""
    return with_unit(value, f"{margin} {unit}".strip())


def is_timing(unit: str) -> bool:
    """True for a unit of times, speeds and bandwidths (``s``, ``tokens/s``, ``GB/s``): they belong to the machine."""
    return unit in _TIME_UNITS or unit.endswith("/s")


def is_number(value: object) -> TypeGuard[int | float]:
    """True for an int or a float, False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def matches(value: Value, expected: Value, tolerance: float) -> bool:
    """True if numbers differ by at most the absolute tolerance (rounding apart), or other values are equal."""
    if is_number(value) and is_number(expected):
        return abs(value - expected) <= tolerance + _ROUNDING * max(abs(value), abs(expected))
    return type(value) is type(expected) and value == expected


def relative_change(first: Value | None, second: Value | None) -> str:
    """Format the change from one number to another: ``+1.5%``, or ``× 12`` from ten times on.

    Empty if they are equal or not numbers, or if the first is 0.
    """
    if not (is_number(first) and is_number(second)) or first in (0, second):
        return ""
    change = (second - first) / abs(first)
    if change >= 9 and first > 0:
        return f"× {second / first:,.3g}"
    return f"{100 * change:+.2g}%" if abs(change) < 0.1 else f"{change:+,.0%}"
