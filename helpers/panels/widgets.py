"""What several panels are made of: a box that shows itself, a text box that asks a model, and a figure that grows.

``_QuestionPanel`` is the base of the chat and of the comparison. It answers in a thread, because Stop and the sliders
reach the kernel only while no cell runs. ``LiveCurve`` is replaced in its cell while a model trains.
"""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from dataclasses import replace
from threading import Event, Thread, Timer
from time import perf_counter
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.panels.html import _piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ipywidgets import Box, DOMWidget, HBox
    from matplotlib.figure import Figure

    from helpers.generation.sampling import Sampling
    from helpers.panels.html import _Html
    from helpers.training.recipe import Point


CURSOR = " ▌"  # stands at the end of a reply that is being written


class _Panel:
    """Something to click that shows its ``box`` in a notebook."""

    box: Box

    def _repr_mimebundle_(
        self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> dict[str, object]:
        bundle: dict[str, object] = self.box._repr_mimebundle_(include=include, exclude=exclude)
        return bundle


class _QuestionPanel(_Panel, ABC):
    """A text box whose question is answered in a thread of its own: Send or Enter asks, Stop ends it after a token.

    Its controls are attributes (``panel.send.click()``), so code drives a panel as a person does. ``locked`` holds the
    controls that are off while a reply is written, ``sliders`` those of the sampling.
    """

    REDRAW_SECONDS = 0.1
    ENTER_SECONDS = 0.2
    MAX_REPLY_TOKENS = 1024

    def __init__(self, sampling: Sampling, suggestions: Sequence[str]) -> None:
        import ipywidgets as w

        self._thread: Thread | None = None
        self._entered: Timer | None = None
        self._stopping = Event()
        self.status = w.HTML()
        self.text = w.Combobox(
            options=tuple(suggestions),
            placeholder="Ask something, then press Enter",
            continuous_update=False,
            layout={"width": "420px"},
        )
        self.send = w.Button(description="Send", button_style="primary", icon="paper-plane")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self._make_sliders(sampling)
        self.locked = [self.send, *self.sliders]
        self.send.on_click(lambda _: self.ask())
        self.stop.on_click(lambda _: self._stopping.set())
        self.text.on_msg(self._on_message)

    def _make_sliders(self, sampling: Sampling) -> None:
        from ipywidgets import FloatSlider, IntSlider

        most = max(self.MAX_REPLY_TOKENS, sampling.max_new_tokens)
        self.temperature = FloatSlider(sampling.temperature, min=0, max=2, step=0.05, description="Temperature")
        self.top_p = FloatSlider(sampling.top_p, min=0.05, max=1, step=0.05, description="Top-p")
        self.max_new_tokens = IntSlider(sampling.max_new_tokens, min=1, max=most, description="Max tokens")
        self.sliders = [self.temperature, self.top_p, self.max_new_tokens]
        for slider in self.sliders:
            # By default a description is cut at 80 pixels.
            slider.style.description_width = "initial"
            slider.layout.width = "280px"
            slider.observe(lambda _: self._set_sampling(), "value")

    def ask(self) -> None:
        """Send the text box's question, unless a reply is being written or the box is blank."""
        text = self.text.value.strip()
        if not text or self.busy:
            return
        self.text.value = ""
        self._set_busy(True)
        # A thread, because Stop and the sliders reach the kernel only while no cell and no callback is running.
        self._thread = Thread(target=self._answer, args=(text,), name=type(self).__name__, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while a reply is being written."""
        return not self.stop.disabled

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the reply that is being written is finished. Raises TimeoutError if it takes longer."""
        if self._entered is not None:
            self._entered.join()
        if self._thread is not None:
            self._thread.join(seconds)
        if self.busy:
            raise TimeoutError(f"The reply is not finished after {seconds} s.")

    def _chosen(self, sampling: Sampling) -> Sampling:
        """The sampling with what the sliders show; the seed stays."""
        return replace(
            sampling,
            temperature=self.temperature.value,
            top_p=self.top_p.value,
            max_new_tokens=self.max_new_tokens.value,
        )

    @abstractmethod
    def _stream(self, text: str) -> bool:
        """Show the answer to a question while it is written. False if it did not end by itself."""

    @abstractmethod
    def _set_sampling(self) -> None:
        """Take what the sliders show."""

    def _on_message(self, _widget: DOMWidget, content: dict[str, object], _buffers: Sequence[bytes]) -> None:
        # Enter reaches the kernel just before the text does, so wait a moment for the text.
        if content.get("event") == "submit":
            self._entered = Timer(self.ENTER_SECONDS, self.ask)
            self._entered.start()

    def _answer(self, text: str) -> None:
        """The thread of one reply. Whatever goes wrong is shown in the panel; a lost question returns to its box."""
        finished = False
        try:
            finished = self._stream(text)
        except Exception as error:
            self._fail(error)
        finally:
            # A question typed meanwhile stays.
            if not finished and not self.text.value:
                self.text.value = text
            self._set_busy(False)

    def _fail(self, error: Exception) -> None:
        """Show why there is no answer."""
        self._say_error(error)

    def _set_busy(self, busy: bool) -> None:
        self._stopping.clear()
        for control in self.locked:
            control.disabled = busy
        self.stop.disabled = not busy

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _say_error(self, error: Exception) -> None:
        self.status.value = _error_html(error)


def _error_html(error: Exception) -> _Html:
    """An error as a reader should see it: the workbook's own in their words, others with the name of their class."""
    text = str(error)
    if not isinstance(error, WorkbookError):
        text = f"{type(error).__name__}: {text}"
    return _piece("error", text)


def _wrapped(controls: Iterable[DOMWidget]) -> HBox:
    """A row of controls that goes on below if the window is narrow."""
    from ipywidgets import HBox

    return HBox(list(controls), layout={"flex_flow": "row wrap"})


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
