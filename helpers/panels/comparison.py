"""The comparison panel: the same question to several models. Unattended, the same call asks a script's questions."""

from __future__ import annotations

import math
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING

from helpers.generation.sampling import Sampling
from helpers.models.loaded import Loaded
from helpers.models.references import ModelRef
from helpers.panels.html import _counted, _Html, _piece, _render, _reply_summary, _show
from helpers.panels.widgets import CURSOR, _error_html, _QuestionPanel, _wrapped

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from pandas import Series

    from helpers.evaluation.comparison import Side
    from helpers.generation.sampling import Reply

_SAMPLING = Sampling(temperature=0, max_new_tokens=100)


def comparison_panel(
    models: Mapping[str, Side],
    sampling: Sampling = _SAMPLING,
    *,
    script: Sequence[str] = (),
    precision: str = "bf16",
) -> _ComparisonPanel | _Html:
    """A panel that asks every model the same question; unattended, the replies to the questions of ``script``.

    If a person is there, ``script`` gives the suggestions of the text box. ``precision`` is that of models given as
    ModelRef, which are loaded for their turn only. Unattended raises as ``comparison.compare`` does.
    """
    return _show(
        lambda: _ComparisonPanel(models, sampling, script, precision),
        lambda: _compared_html(models, script, sampling, precision),
    )


def _compared_html(models: Mapping[str, Side], script: Sequence[str], sampling: Sampling, precision: str) -> _Html:
    """Ask every model the questions of ``script`` and show the replies side by side, with their median speeds."""
    from helpers.evaluation.comparison import compare

    compared = compare(script, models, sampling, precision=precision)
    names = _column_names(models)
    asked = []
    for place, question in enumerate(script):
        replies = []
        for side, name in names.items():
            reply = compared.replies[side][place]
            replies.append((name, reply.text, _reply_summary(reply)))
        asked.append((question, replies))
    medians = "; ".join(f"{name} {_speed_text(row)}" for name, row in compared.speed().iterrows())
    caption = f"Medians of {_counted(len(script), 'reply', 'replies')}, written one at a time: {medians}"
    return _render("compared.j2", labels=_labels(models), asked=asked, caption=caption)


def _speed_text(row: Series) -> str:
    first = f"first token after {row['first token (s)']:.2f} s"
    # Replies of one token have no speed.
    if math.isnan(row["tokens/s"]):
        return first
    return f"{row['tokens/s']:.0f} tokens/s, {row['characters/s']:.0f} characters/s, {first}"


def _ref(model: Side) -> ModelRef:
    return model.ref if isinstance(model, Loaded) else model


def _labels(models: Mapping[str, Side]) -> list[tuple[str, str]]:
    """Each model's name with what its label adds to it: stand-ins are named as such."""
    labels = []
    for side, name in _column_names(models).items():
        ref = _ref(models[side])
        labels.append((name, ref.label.removeprefix(ref.name).strip()))
    return labels


def _column_names(models: Mapping[str, Side]) -> dict[str, str]:
    from helpers.evaluation.comparison import Comparison

    return Comparison.names_of({side: _ref(model).name for side, model in models.items()})


class _ComparisonPanel(_QuestionPanel):
    """One question to several models, their replies side by side. Every question is a fresh one, without history.

    Loaded models write at the same time, a piece from each in turn; if one is given as ModelRef they go one after the
    other, each loaded for its turn only. Stop ends all. ``replies`` holds the finished replies to the question last
    asked, ``columns`` what is shown of each side. An error of one side stands in its column.
    """

    def __init__(
        self, models: Mapping[str, Side], sampling: Sampling, suggestions: Sequence[str] = (), precision: str = "bf16"
    ) -> None:
        import ipywidgets as w

        super().__init__(sampling, suggestions)
        self.models, self.sampling, self.precision = models, sampling, precision
        self.replies: dict[str, Reply] = {}
        self.columns = {side: _Column(name) for side, name in _column_names(models).items()}
        self.question = w.HTML()
        title = w.HTML(_piece("sides", _labels(models)))
        row = _wrapped(column.view for column in self.columns.values())
        asking = _wrapped([self.text, self.send, self.stop])
        parts = [title, self.question, row, asking, self.status, _wrapped(self.sliders)]
        self.box = w.VBox(parts, layout={"max_width": "864px"})

    @property
    def together(self) -> bool:
        """True if all models are loaded and so write at the same time."""
        return all(isinstance(model, Loaded) for model in self.models.values())

    def _set_sampling(self) -> None:
        self.sampling = self._chosen(self.sampling)

    def _stream(self, text: str) -> bool:
        self.replies = {}
        self.question.value = _piece("question", text)
        for column in self.columns.values():
            column.begin()
        groups = [[side] for side in self.models]
        if self.together:
            groups = [list(self.models)]
        for sides in groups:
            # After a stop no further model is loaded.
            if not self._stopping.is_set():
                self._write(sides, text)
        self._say(self._ending())
        return len(self.replies) == len(self.models)

    def _write(self, sides: Sequence[str], question: str) -> None:
        """Show the replies of these sides while they are written, a piece from each in turn."""
        columns = [self.columns[side] for side in sides]
        replies = [self._reply(side, question) for side in sides]
        drawn = 0.0
        for pieces in zip_longest(*replies, fillvalue=""):
            for column, part in zip(columns, pieces, strict=True):
                column.text += part
            if self._stopping.is_set():
                # Closed generators end at their next piece, so the loop ends by itself.
                for reply in replies:
                    reply.close()
            elif perf_counter() - drawn > self.REDRAW_SECONDS:
                for column in columns:
                    column.draw()
                drawn = perf_counter()

    def _reply(self, side: str, question: str) -> Generator[str, None, None]:
        """The pieces of one side's reply; however it ends is shown below it."""
        from helpers.evaluation.comparison import opened
        from helpers.generation.generating import stream

        column, model = self.columns[side], self.models[side]
        # A closed generator leaves through ``finally`` alone.
        below = _piece("note", "Stopped.")
        try:
            if isinstance(model, ModelRef):
                self._say(f"loading {model.label} in {self.precision} ...")
            with opened(model, self.precision) as loaded:
                self._say("writing ...")
                column.writing = True
                reply = yield from stream(loaded, [{"role": "user", "content": question}], self.sampling)
            self.replies[side] = reply
            below = _piece("note", _reply_summary(reply))
        except Exception as error:
            below = _error_html(error)
        finally:
            column.end(below)

    def _ending(self) -> str:
        if self._stopping.is_set():
            return "Stopped."
        if len(self.replies) < len(self.models):
            return "Not every model has replied: the reason stands in its column."
        if self.together and len(self.models) > 1:
            return "Done. The models wrote at the same time, so each was slower than it is alone."
        return "Done."


class _Column:
    """What is shown of one side: its name, the reply as far as it is written, and what stands below it."""

    def __init__(self, name: str) -> None:
        from ipywidgets import HTML

        self.name = name
        # Columns share the width; below 320 pixels each they wrap. Long words must not widen them.
        self.view = HTML(layout={"flex": "1 1 320px", "min_width": "0"})
        self.begin()

    def begin(self) -> None:
        """Show an empty reply."""
        self.text, self.below, self.writing = "", _Html(), False
        self.draw()

    def end(self, below: _Html) -> None:
        """Show the reply as it is, with something below it."""
        self.below, self.writing = below, False
        self.draw()

    def draw(self) -> None:
        """Show the reply as far as it is written."""
        text = self.text + CURSOR if self.writing else self.text
        self.view.value = _piece("reply", self.name, text, self.below)
