"""A recorded value as a reader sees it: a line below a cell, a row of a table.

Two questions are answered apart, each in words of its own: does this run agree with what the article says, and is the
value as in earlier runs? A value can be as expected and refute the article, and the other way round.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.runs.expected import _with_tolerance, _with_unit
from helpers.runs.schema import AS_EXPECTED, DIFFERS, UNMEASURED, _Claim, _RecordedValue
from helpers.runs.wording import AGREES, DISAGREES, NOT_JUDGED, TOO_CLOSE, _answer, _said

if TYPE_CHECKING:
    from helpers.runs.schema import Value, Verdict

_COLUMNS = ["model", "value", "expected", "earlier runs", "claim", "the article says", "this run"]
_EARLIER: dict[Verdict, str] = {
    AS_EXPECTED: "as expected",
    DIFFERS: "differs from earlier runs",
    UNMEASURED: "no earlier run",
}
# Dark words on a light ground can be read in a light and in a dark theme. That the article is wrong is a finding, not a
# fault of the run: it is not red.
_GOOD, _BAD = "#d5f0e6;color:#00482f", "#fbe3df;color:#8c1d0a"
_DOUBTFUL, _PLAIN = "#fde3b0;color:#5c3c00", "#e4e6ea;color:#333333"
_GROUNDS = {
    _EARLIER[AS_EXPECTED]: _GOOD, _EARLIER[DIFFERS]: _BAD, _EARLIER[UNMEASURED]: _PLAIN,
    AGREES: _GOOD, DISAGREES: _DOUBTFUL, TOO_CLOSE: _PLAIN, NOT_JUDGED: _PLAIN,
}  # fmt: skip
# What a side is called if a value was computed: from the published configurations of the real pair.
_REAL = {"falcon": "Falcon-180B", "llama": "Llama-2-70B"}


@dataclass(frozen=True)
class _Record:
    """One recorded value compared with the expected one and with its claim. It shows itself as a line in a notebook."""

    name: str
    content: _RecordedValue
    claim: _Claim | None = None

    @property
    def shown_name(self) -> str:
        """The name with the model's own name for its side."""
        return _shown_name(self.name, self.content.model)

    @property
    def value(self) -> Value:
        """The value, a plain number, text or bool."""
        return self.content.value

    @property
    def verdict(self) -> Verdict:
        """Whether the value is as expected."""
        return self.content.verdict

    @property
    def earlier(self) -> str:
        """Whether the value is as in earlier runs, in words."""
        return _EARLIER[self.verdict]

    @property
    def answer(self) -> str:
        """What the value says to the article, in words; empty if it has no claim."""
        return _answer(self.claim, self.name, self.content) if self.content.claim else ""

    @property
    def said(self) -> str:
        """What the article says; empty if the value has no claim, or one that is not in the list."""
        return _said(self.claim, self.name, self.content.unit) if self.claim else ""

    def row(self) -> dict[str, str]:
        """The value as a row of a table, under its name."""
        cells = (
            _model_name(self.content.model),
            _with_unit(self.value, self.content.unit),
            _with_tolerance(self.content.expected, self.content.tolerance, self.content.unit),
            self.earlier, self.content.claim or "", self.said, self.answer,
        )  # fmt: skip
        return dict(zip(_COLUMNS, cells, strict=True))

    def __str__(self) -> str:
        earlier = self.earlier if self.verdict == UNMEASURED else f"{self.earlier} ({self._expectation()})"
        parts = [f"{self.shown_name}: {self._shown()}", earlier]
        if self.content.claim:
            parts.append(f"{self._sentence()}: {self.answer}")
        return " | ".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [f"{html.escape(self.shown_name)}: <b>{html.escape(self._shown())}</b>"]
        if self.content.claim:
            lines.append(f"{html.escape(self._sentence())}: {_coloured(self.answer)}")
        margin = "" if self.verdict == UNMEASURED else f" ({html.escape(self._expectation())})"
        lines.append(f"{_coloured(self.earlier)}{margin}")
        return f'<div style="border-left:4px solid #8a93a3;padding:2px 10px;margin:2px 0">{"<br>".join(lines)}</div>'

    def _shown(self) -> str:
        return _with_unit(self.value, self.content.unit)

    def _expectation(self) -> str:
        who = "cited" if (self.content.source or "").startswith("citation") else "earlier runs"
        return f"{who}: {_with_tolerance(self.content.expected, self.content.tolerance, self.content.unit)}"

    def _sentence(self) -> str:
        said = f"the article says {self.said}" if self.said else "not in the list of claims"
        where = f" on {_model_name(self.content.model)}" if self.content.model else ""
        return f"{self.content.claim}: {said}; this run{where}"


class _Records(tuple[_Record, ...]):
    """Several recorded values. They show themselves as a line each in a notebook."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(str(entry) for entry in self)

    def _repr_html_(self) -> str:
        return "".join(entry._repr_html_() for entry in self)


def _coloured(words: str) -> str:
    return f'<b style="padding:0 6px;border-radius:8px;background:{_GROUNDS[words]}">{words}</b>'


def _model_name(label: str | None) -> str:
    """The model's own name, without what it stands in for: a label reads "falcon-mini (stand-in for ...)"."""
    return label.split(" (")[0] if label else ""


def _shown_name(name: str, label: str | None) -> str:
    """A value's name with the model's own name for its side: a number of falcon-mini's must not read as Falcon's."""
    words = []
    for word in name.split("_"):
        words.append((_model_name(label) or _REAL[word]) if word in _REAL else word)
    return " ".join(words)
