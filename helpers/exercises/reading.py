"""An answer in whatever type it comes: numbers, lists and tensors. What cannot be read is told, not guessed."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class _UnreadableError(Exception):
    """An answer of a type that the check cannot read. The message says what is expected."""


def _number(answer: object) -> float:
    """A number of Python, numpy or torch; of an array or tensor its only element.

    Raises _UnreadableError for everything else.
    """
    answer = _plain(answer)
    while isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Real) and not isinstance(answer, bool) and not math.isnan(answer):
        return float(answer)
    raise _UnreadableError(_expected("a number", answer))


def _listed(answer: object) -> list[object]:
    """The elements of a list, tuple, array or tensor. Raises _UnreadableError for everything else."""
    answer = _plain(answer)
    if isinstance(answer, list | tuple):
        return list(answer)
    raise _UnreadableError(_expected("a list", answer))


def _numbers(answer: object, count: int) -> list[float]:
    """That many numbers, of a list, tuple, array or tensor. Raises _UnreadableError for everything else."""
    elements = _listed(answer)
    if len(elements) != count:
        raise _UnreadableError(f"Expected {count} numbers, but there are {len(elements)}.")
    return [_number(element) for element in elements]


def _tensor(answer: object) -> Tensor:
    """A tensor of float32, from a tensor, an array or lists of numbers. Raises _UnreadableError for everything else."""
    import torch

    if isinstance(answer, torch.Tensor):
        return answer.detach().float().cpu()
    try:
        return torch.tensor(_listed(answer), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise _UnreadableError(_expected("a tensor of numbers", answer)) from error


def _text(answer: object) -> str:
    """A text. Raises _UnreadableError for everything else."""
    if isinstance(answer, str):
        return answer
    raise _UnreadableError(_expected("a text", answer))


def _plain(answer: object) -> object:
    """What a tensor or array holds, as Python's numbers and lists."""
    import numpy
    import torch

    if isinstance(answer, torch.Tensor):
        return answer.detach().cpu().tolist()
    return answer.tolist() if isinstance(answer, numpy.ndarray | numpy.generic) else answer


def _expected(what: str, answer: object) -> str:
    if answer is None or answer is ...:
        return f"Expected {what}, but there is nothing yet."
    shown = repr(answer)
    if len(shown) > 80:
        shown = shown[:80] + "…"
    return f"Expected {what}, but this is {shown} ({type(answer).__name__})."


def _is_close(number: float, expected: float, relative: float = 0.01) -> bool:
    """True if a number is within the relative distance of the expected one."""
    return abs(number - expected) <= relative * abs(expected)


def _other_unit(number: float, expected: float, units: Mapping[str, float], relative: float = 0.01) -> str | None:
    """What is off if a number is the expected one in another unit. ``units``: its words, and how many make one."""
    for words, factor in units.items():
        if _is_close(number, expected * factor, relative):
            return f"That is the answer {words}."
    return None
