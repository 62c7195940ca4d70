"""Spread pieces of given sizes over devices of given limits, in order: plain arithmetic, without models.

``_fill`` fills one device after the other and is quick. ``_spread`` also balances the load, by bisection and then
dynamic programming. ``placement`` uses both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def _spread(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The device of each piece, order kept: minimise the highest utilisation, then balance the devices.

    ``sizes`` are the pieces' bytes, ``limits`` the devices'; pieces that do not fit exceed all limits by one factor.
    """
    too_low, enough = 0.0, 1.0
    if not _fill(sizes, limits):
        enough = 2 * sum(sizes) / min(limits)  # any device then holds all pieces, whatever the rounding
    # Sixty halvings bring the least utilisation below the rounding of a float.
    for _ in range(60):
        middle = (too_low + enough) / 2
        if _fill(sizes, [middle * limit for limit in limits]):
            enough = middle
        else:
            too_low = middle
    return _most_even(sizes, [enough * limit for limit in limits])


def _fill(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The device of each piece, one device after the other filled up to its limit; empty if they do not fit."""
    devices, device, used = [], 0, 0
    for size in sizes:
        while used + size > limits[device]:
            device, used = device + 1, 0
            if device == len(limits):
                return []
        devices.append(device)
        used += size
    return devices


@dataclass(frozen=True)
class _Split:
    """The first pieces over the first devices: the cost so far, and the piece before which each device ends."""

    cost: float
    ends: tuple[int, ...] = ()


def _most_even(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The placement within the limits with the least sum of used² / limit, by dynamic programming."""
    # The best split for each number of pieces placed, over the devices so far: what comes later depends on no more.
    best = {0: _Split(0.0)}
    for limit in limits:
        longer: dict[int, _Split] = {}
        for placed, split in best.items():
            # The device takes no piece, the next one, the next two, ... until its limit.
            for end, used in enumerate(accumulate(sizes[placed:], initial=0), placed):
                if used > limit:
                    break
                cost = split.cost + used * used / limit
                if end not in longer or cost < longer[end].cost:
                    longer[end] = _Split(cost, (*split.ends, end))
        best = longer
    devices: list[int] = []
    for device, (start, end) in enumerate(pairwise([0, *best[len(sizes)].ends])):
        devices += [device] * (end - start)
    return devices
