"""A figure that grows in its cell while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from helpers.finetuning import Point


class LiveCurve:
    """A figure that grows with a training: ``on_point=curve.update``, and at the end ``curve.finish(history)``.

    ``draw`` makes the figure of a history. It is shown in the cell that is the first to call, and replaced in place.
    """

    REDRAW_SECONDS = 1.0

    def __init__(self, draw: Callable[[Sequence[Point]], Figure]) -> None:
        from IPython.display import DisplayHandle

        self._draw, self._display = draw, DisplayHandle()
        self._drawn: float | None = None

    def update(self, history: Sequence[Point]) -> None:
        """Show a history, unless one was shown within the last second."""
        # Drawing takes a tenth of a second or more: after each point it would slow the training down.
        if self._drawn is None or perf_counter() - self._drawn >= self.REDRAW_SECONDS:
            self.finish(history)

    def finish(self, history: Sequence[Point]) -> None:
        """Show a history in any case."""
        figure = self._draw(history)
        if self._drawn is None:
            self._display.display(figure)
        else:
            self._display.update(figure)
        self._drawn = perf_counter()
