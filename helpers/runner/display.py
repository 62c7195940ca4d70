"""The progress of a run on the terminal: a live table, or plain lines where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 10.0
STYLES = {"pending": "dim", "running": "cyan", "passed": "green", "failed": "bold red"}

Show = Callable[[Mapping[str, Any]], None]


@contextmanager
def display(console: Console) -> Iterator[Show]:
    """A function that shows a run's status (see ``helpers.runner.folder``), each time it is called."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda status: live.update(table(status))


class PlainLines:
    """Prints a line when a notebook starts, at times while it runs, and when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, str] = {}
        self.printed = 0.0

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Print what is new in a run's status."""
        for name, entry in status["notebooks"].items():
            changed = self.last.get(name, "pending") != entry["status"]
            due = entry["status"] == "running" and entry["cell"] and monotonic() - self.printed > LINE_SECONDS
            if changed or due:
                self.printed = monotonic()
                self.console.print(f"{name}: {describe(entry)}", highlight=False, markup=False, soft_wrap=True)
            self.last[name] = entry["status"]


def describe(entry: Mapping[str, Any]) -> str:
    """One notebook's state in words: ``running, cell 3 of 12, 4 s of 90 s``."""
    parts = [entry["status"]]
    if entry["status"] == "running" and entry["cells"]:
        parts.append(f"cell {entry['cell']} of {entry['cells']}")
    if entry["status"] != "pending":
        parts.append(f"{entry['seconds']:.0f} s of {entry['budget_seconds']:g} s")
    if entry["reason"]:
        parts.append(entry["reason"])
    return ", ".join(parts)


def table(status: Mapping[str, Any]) -> Table:
    """All notebooks of a run, one row each."""
    rows = Table(box=None, pad_edge=False)
    for column in ("notebook", "status", "cell", "time", "budget", ""):
        rows.add_column(column, justify="right" if column in ("cell", "time", "budget") else "left")
    for name, entry in status["notebooks"].items():
        rows.add_row(
            name,
            Text(entry["status"], STYLES[entry["status"]]),
            f"{entry['cell']}/{entry['cells']}" if entry["cells"] else "",
            f"{entry['seconds']:.0f} s" if entry["seconds"] else "",
            f"{entry['budget_seconds']:g} s",
            Text(entry["reason"] or (entry["line"] if entry["status"] == "running" else ""), overflow="ellipsis"),
        )
    return rows
