"""Time that counts: a stopped or frozen process computes nothing, and no budget should run out meanwhile."""

from __future__ import annotations

from time import monotonic

# Between two looks that should be a quarter of a second apart, at most this many seconds count. A machine may be so
# busy that a look comes two seconds late; later, it was stopped. Where it is busier still, time counts all the same.
LONGEST_GAP = 2.0


class Clock:
    """Seconds since it was made, without those in which this process was stopped (Ctrl-Z, a paused container).

    Nothing tells a process that it was stopped, but that the clock has jumped between two looks. So look often.
    """

    def __init__(self) -> None:
        self._looked = monotonic()
        self._counted = 0.0

    def look(self) -> float:
        """The seconds so far."""
        now = monotonic()
        self._counted += min(now - self._looked, LONGEST_GAP)
        self._looked = now
        return self._counted
