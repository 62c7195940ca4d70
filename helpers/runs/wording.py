"""What the wording of a claim demands of a recorded value, whatever a notebook thinks of it.

A statement such as "at least 64 GPUs" is not confirmed by a machine that is large enough: a smaller one that will do
refutes it. The judgement is made here from the claim's wording and the value alone, so that no notebook can call such
a claim confirmed. Claims without a wording are judged by the notebook that records the value.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.runs.schema import Value, _Claim, _ClaimPart, _RecordedValue

AGREES = "agrees"
DISAGREES = "does not agree"
TOO_CLOSE = "too close to tell"
NOT_JUDGED = "not judged"
# "At least" and "enough" speak of whole machines, and a rounding error must not move one over the line.
_ROUNDING = 1e-9
_QUOTED = 110  # letters of a statement beside a value; the report has all of it


def _meets(part: _ClaimPart, value: Value) -> bool | None:
    """Whether a value is what the wording of a part demands; None if it cannot tell.

    "about": the value is within the margin, as a share of the number. "at least": the value is the smallest that will
    do, and it may not be below the number. "enough": it may not be above the number. On the wrong side of the number
    by less than the margin, which is then how sure the value is, a value neither confirms nor refutes.
    """
    number = _finite(part.number)
    measured = _finite(value)
    if number is None or measured is None:
        return None
    margin = part.margin or 0.0
    off = measured / number - 1
    if part.wording == "about":
        return abs(off) <= margin + _ROUNDING
    short = -off if part.wording == "at least" else off
    if short <= _ROUNDING:
        return True
    return None if short < margin else False


def _finite(value: Value | None) -> float | None:
    """A number, also one that is kept as an integer; None for anything else."""
    if isinstance(value, bool | str) or value is None or not math.isfinite(value):
        return None
    return value


def _judged_parts(claim: _Claim) -> list[_ClaimPart]:
    """The parts of a claim that values can be judged by."""
    return [part for part in claim.parts if part.wording is not None]


def _part_of(claim: _Claim, name: str) -> _ClaimPart | None:
    """The first part of a claim that is judged by the value of this name."""
    for part in _judged_parts(claim):
        if name in part.values:
            return part
    return None


def _agrees(claim: _Claim | None, name: str, value: _RecordedValue) -> bool | None:
    """Whether a value agrees with its claim; None if it only illustrates it, or cannot tell.

    If the claim has a wording, that alone decides: what the notebook thought is not asked.
    """
    if claim is None or not _judged_parts(claim):
        return value.agrees
    part = _part_of(claim, name)
    return None if part is None else _meets(part, value.value)


def _answer(claim: _Claim | None, name: str, value: _RecordedValue) -> str:
    """What a run says to a claim by one of its values, in words."""
    agrees = _agrees(claim, name, value)
    if agrees is not None:
        return AGREES if agrees else DISAGREES
    return TOO_CLOSE if claim is not None and _part_of(claim, name) else NOT_JUDGED


def _said(claim: _Claim, name: str, unit: str) -> str:
    """What the article says that this value is compared with: the number of its wording, or what was published."""
    part = _part_of(claim, name)
    if part is None:
        return _quoted(claim.published or claim.statement)
    number = f"{_plain(part.number)} {unit}".rstrip()
    if part.wording == "enough":
        return f"{number} are enough"
    reading = f" ({part.name})" if part.name and part.wording == "about" else ""
    return f"{part.wording} {number}{reading}"


def _quoted(text: str) -> str:
    return f"“{textwrap.shorten(text, _QUOTED, placeholder=' …')}”"


def _plain(number: float | None) -> str:
    """A published number as people write it: 7.5e9 is 7,500,000,000, and 2.5 stays 2.5."""
    return "" if number is None else f"{number:,.12g}"
