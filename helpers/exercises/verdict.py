"""What a check of an exercise says: right, or not yet, with a hint."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

Hint = str | None  # None: the answer is right
Check = Callable[..., Hint]  # takes the answer: a number, or a function of the exercise's own signature


@dataclass(frozen=True)
class _Verdict:
    """What a check says about an answer. ``text`` is a hint if the answer is not right yet."""

    name: str
    right: bool
    text: str

    def __str__(self) -> str:
        verdict = "right" if self.right else "not yet"
        return f"Exercise {self.name}: {verdict}. {self.text}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour, word = "#b35900", "Not yet."
        if self.right:
            colour, word = "#00805a", "Right."
        # The hint quotes what the reader's own function returned, so it may hold markup.
        return (
            f'<div style="border-left:4px solid {colour};padding:4px 10px"><b style="color:{colour}">{word}</b> '
            f"Exercise {html.escape(self.name)}. {html.escape(self.text)}</div>"
        )


def _is_close(answer: object, expected: float, relative: float = 0.01) -> bool:
    """True if the answer is a number within the relative distance of the expected one."""
    if not isinstance(answer, Real):
        return False
    return abs(float(answer) - expected) <= relative * abs(expected)
