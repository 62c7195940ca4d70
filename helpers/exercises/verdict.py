"""What a check says of an answer: not started, not yet or right; and the hints, a step at a time."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

_NOT_STARTED, _NOT_YET, _RIGHT = "not started", "not yet", "right"
_COLOURS = {_NOT_STARTED: "#6b7280", _NOT_YET: "#b35900", _RIGHT: "#00805a"}
# What a function is made of whose body is three dots, ``pass`` or ``return None``.
_EMPTY_BODY = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}


@dataclass(frozen=True)
class _Found:
    """A right answer, and what the check measured to say so."""

    text: str


Outcome = str | _Found | None  # a text says what is off; None and _Found: the answer is right


def _is_stub(answer: object) -> bool:
    """True for three dots, and for a function that does nothing."""
    if not isinstance(answer, FunctionType):
        return answer is ...
    import dis

    for step in dis.get_instructions(answer):
        if step.opname not in _EMPTY_BODY or ("CONST" in step.opname and step.argval is not None):
            return False
    return True


@dataclass(frozen=True)
class _Exercise:
    """How an answer is checked, and the hints from the first nudge on. ``is_untouched``: the reader has not begun."""

    check: Callable[..., Outcome]
    hints: tuple[str, ...]
    is_untouched: Callable[[object], bool] = _is_stub


@dataclass(frozen=True)
class _Verdict:
    """What a check says about an answer. ``text`` says what is off, or what was found; nothing of a stub."""

    name: str
    state: str
    text: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.state == _RIGHT

    @property
    def started(self) -> bool:
        """Whether there is an answer at all."""
        return self.state != _NOT_STARTED

    def __str__(self) -> str:
        return f"Exercise {self.name}: {self.state}. {self._rest}".strip()

    __repr__ = __str__

    @property
    def _rest(self) -> str:
        if self.state == _NOT_YET:
            return f'{self.text} For a hint: exercises.hint("{self.name}")'
        return self.text

    def _repr_html_(self) -> str:
        # The text quotes what the reader's own function returned, so it may hold markup.
        title = html.escape(f"Exercise {self.name}: {self.state}.")
        return _card(_COLOURS[self.state], f"<b>{title}</b> {html.escape(self._rest)}")


@dataclass(frozen=True)
class _Hints:
    """The hints of an exercise that have been asked for so far."""

    name: str
    given: tuple[str, ...]
    total: int

    @property
    def _lines(self) -> list[str]:
        lines = [f"Hint {number} of {self.total}: {text}" for number, text in enumerate(self.given, 1)]
        if len(self.given) == self.total:
            lines.append("That was the last one. The solution is folded below the exercise.")
        return lines

    def __str__(self) -> str:
        return "\n".join([f"Exercise {self.name}", *self._lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [html.escape(line) for line in (f"Exercise {self.name}", *self._lines)]
        return _card("#1f5fbf", "<br>".join(lines))


def _card(colour: str, content: str) -> str:
    return f'<div style="border-left:4px solid {colour};padding:4px 10px">{content}</div>'
