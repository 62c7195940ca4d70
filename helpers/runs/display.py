"""The progress of a run on the terminal: a live table, or plain lines if the output is not a terminal.

Showing never stops a run: when nobody reads any more (``| head -1``), or the disk of a log is full, it just ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from helpers.base.terminal import tell
from helpers.base.text import one_line
from helpers.runs.schema import _Status

if TYPE_CHECKING:
    from rich.console import Console

    from helpers.runs.schema import _NotebookStatus

# A log that is read later needs few lines; a person who waits, a sign of life.
LINE_SECONDS = 10.0
TABLE_SECONDS = 0.2
_STYLES = {"pending": "dim", "running": "cyan", "passed": "green", "failed": "bold red"}
Show = Callable[[_Status], None]


@contextmanager
def _display(console: Console) -> Iterator[Show]:
    """A function that shows the status of a run each time it is called."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    # Drawn by our own calls alone: in a thread of its own, an error of the terminal would be a traceback.
    live = Live(console=console, auto_refresh=False)
    start, show, stop = (_WhileRead(function) for function in (live.start, _Drawn(live), live.stop))
    start()
    try:
        yield show
    finally:
        stop()


class _WhileRead:
    """Calls a function until it cannot write: a reader who is gone, or a full disk, must not stop a run."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function: Callable[..., object] | None = function

    def __call__(self, *arguments: object) -> None:
        """Call the function, unless it failed before."""
        if self.function is None:
            return
        try:
            self.function(*arguments)
        # rich exits when a pipe is closed; a terminal may lack the letters (UnicodeEncodeError).
        except (OSError, ValueError, SystemExit):
            self.function = None


class _Drawn:
    """Draws the table, a few times a second at most."""

    def __init__(self, live: Live) -> None:
        self.live, self.drawn = live, 0.0

    def __call__(self, status: _Status) -> None:
        """Draw the status of a run if it is time, or if the run has ended."""
        due = monotonic() - self.drawn > TABLE_SECONDS
        self.live.update(_table(status), refresh=due)
        if due:
            self.drawn = monotonic()


class _PlainLines:
    """Prints a line when a notebook starts, at times while it runs, and when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, str] = {}
        self.printed = 0.0

    def __call__(self, status: _Status) -> None:
        """Print what is new in the status of a run."""
        for name, entry in status.notebooks.items():
            changed = self.last.get(name, "pending") != entry.status
            if changed or self._is_due(entry):
                self.printed = monotonic()
                line = one_line(f"{name}: {_describe(entry)}")
                tell(self.console, line)
            self.last[name] = entry.status

    def _is_due(self, entry: _NotebookStatus) -> bool:
        started = entry.status == "running" and entry.cell > 0
        return started and monotonic() - self.printed > LINE_SECONDS


def _describe(entry: _NotebookStatus) -> str:
    """One notebook's state in words: ``running, cell 3 of 12, 4 s of 90 s``."""
    parts: list[str] = [entry.status]
    if entry.status == "running" and entry.cells:
        parts.append(f"cell {entry.cell} of {entry.cells}")
    if entry.status != "pending":
        parts.append(f"{entry.seconds:.0f} s of {entry.budget_seconds:g} s")
    if entry.reason:
        parts.append(entry.reason)
    return ", ".join(parts)


def _table(status: _Status) -> Table:
    """All notebooks of a run, one row each."""
    rows = Table(box=None, pad_edge=False)
    for column in ("notebook", "status"):
        rows.add_column(column)
    for column in ("cell", "time", "budget"):
        rows.add_column(column, justify="right")
    rows.add_column("")
    for name, entry in status.notebooks.items():
        # As Text, because a line of code may hold what rich takes for its markup.
        remark = Text(one_line(_remark(entry)), overflow="ellipsis")
        state = Text(entry.status, _STYLES[entry.status])
        cell = f"{entry.cell}/{entry.cells}" if entry.cells else ""
        time = f"{entry.seconds:.0f} s" if entry.seconds else ""
        rows.add_row(Text(one_line(name)), state, cell, time, f"{entry.budget_seconds:g} s", remark)
    return rows


def _remark(entry: _NotebookStatus) -> str:
    """Why a notebook failed, or the line at which it is."""
    if entry.reason:
        return entry.reason
    return entry.line if entry.status == "running" else ""
