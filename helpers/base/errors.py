"""The error that every group raises, and the words for a name that is unknown and for a long list of names."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

_Option = TypeVar("_Option", bound=str)


class WorkbookError(Exception):
    """An error whose message tells the reader what to do about it."""


def choose(value: str, options: Iterable[_Option], what: str, error: type[Exception] = WorkbookError) -> _Option:
    """The option that equals ``value``. ``what`` is the noun for it, such as "profile".

    Raises ``error`` if there is none, listing the options.
    """
    names = tuple(options)
    for name in names:
        if name == value:
            return name
    raise error(f"There is no {what} {value!r}. Choose one of: {', '.join(names)}.")


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first names in alphabetical order as text, such as "a, b, c and 4 more"."""
    ordered = sorted(names)
    text = ", ".join(ordered[:count])
    if len(ordered) > count:
        text += f" and {len(ordered) - count} more"
    return text


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Raise WorkbookError unless a value is a whole number, numpy's too, from ``least`` to ``most`` (None: no end)."""
    if hasattr(value, "__index__") and not isinstance(value, bool):
        number = operator.index(value)
        if least <= number and (most is None or number <= most):
            return
    end = "up" if most is None else f"to {most}"
    raise WorkbookError(f"{name} must be a whole number from {least} {end}, but is {value!r}.")
