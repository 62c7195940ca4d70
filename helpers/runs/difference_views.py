"""Show the difference of two runs, as tables on a terminal and as an HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.files import write_text
from helpers.runs.difference import DifferenceError, _Pair
from helpers.runs.difference_values import BEYOND, NOISE, ONLY_A, ONLY_B, SAME, SLOW, WITHIN
from helpers.runs.expected import _format_value, _with_unit
from helpers.runs.pages import _render_page

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from helpers.runs.difference import _RunDifference
    from helpers.runs.difference_values import _Line

_VERDICTS = (SAME, WITHIN, BEYOND, NOISE, SLOW, ONLY_A, ONLY_B)
# How a verdict looks on a terminal, and its class on the page.
_STYLES = {SAME: "dim", NOISE: "dim", WITHIN: "green"}
_MARKS = {SAME: "same", WITHIN: "as-expected", SLOW: "on-stand-in"}


def tables(difference: _RunDifference) -> Iterator[RenderableType]:
    """Yield the comparison in parts, for a terminal of 80 columns or more; the outcome comes last."""
    from rich.text import Text

    for warning in difference.warnings:
        yield Text(f"Note: {warning}", style="yellow")
    yield _run_table(difference)
    yield _notebook_table(difference)
    for notebook, lines in _by_notebook(difference.lines).items():
        yield _value_table(notebook, lines)
    if difference.claims:
        yield _pair_table("Claims with another verdict", difference.claims)
    for group, pairs in difference.changes.items():
        yield _pair_table(f"Changed: {group.lower()}", pairs)
    counts = difference.counts
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict])
    outcome = Text(difference.outcome.capitalize(), style="bold red" if difference.differing else "bold green")
    yield Text.assemble(outcome, f". {len(difference.lines)} values: {counted or 'none recorded'}.")


def _run_table(difference: _RunDifference) -> Table:
    table = _table("The runs", "", "A", "B")
    for pair in (_Pair("Run", *difference.names), *difference.facts):
        table.add_row(pair.what, *_texts(pair))
    return table


def _notebook_table(difference: _RunDifference) -> Table:
    table = _table("Notebooks", "", "A", "B", "time A", "time B")
    for status, time in zip(difference.statuses, difference.times, strict=True):
        table.add_row(status.what, *_texts(status), time.first, time.second)
    return table


def _value_table(notebook: str, lines: Iterable[_Line]) -> Table:
    from rich.text import Text

    table = _table(notebook, "value", "A", "B")
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column("", ratio=2)
    for line in lines:
        name = Text(line.name)
        name.append(f" ({line.unit})" if line.unit else "", style="dim")
        for note in line.notes:
            name.append(f"\n{note}", style="yellow")
        first, second = Text(_format_value(line.first)), Text(_format_value(line.second))
        style = "bold red" if line.counts else _STYLES.get(line.verdict, "yellow")
        verdict = Text(f"{line.verdict} {_shown_noise(line)}".rstrip(), style=style)
        table.add_row(name, first, second, line.change, verdict)
    return table


def _pair_table(title: str, pairs: Iterable[_Pair]) -> Table:
    from rich.text import Text

    table = _table(title, "", "A", "B")
    for pair in pairs:
        table.add_row(Text(pair.what), Text(pair.first), Text(pair.second))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    heading = Text(f"\n{title}", style="bold")
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold", ratio=3)
    for name in others:
        table.add_column(name, overflow="fold", ratio=2)
    return table


def _texts(pair: _Pair) -> tuple[Text, Text]:
    # As Text, here and below, because a value may hold what rich takes for its markup.
    from rich.text import Text

    return Text(pair.first), Text(pair.second, style="yellow" if pair.differs else "")


def write_page(difference: _RunDifference, target: Path | None = None) -> Path:
    """Write the comparison as an HTML page, by default ``diff-<A>.html`` in B's folder, and return its path.

    Raises DifferenceError if it cannot be written.
    """
    target = target or difference.run_b / f"diff-{difference.names[0]}.html"
    try:
        write_text(target, _render_page("difference.html.j2", _content(difference)))
    except OSError as error:
        raise DifferenceError(f"Cannot write {target} ({error.strerror}). Name another file with --html.") from error
    return target


def _content(difference: _RunDifference) -> dict[str, object]:
    """What the page shows."""
    by_notebook = _by_notebook(difference.lines)
    return {
        "name_a": difference.names[0],
        "name_b": difference.names[1],
        "found": difference,
        "tiles": _tiles(difference),
        "notebooks": list(zip(difference.statuses, difference.times, strict=True)),
        "values": {notebook: list(map(_shown, lines)) for notebook, lines in by_notebook.items()},
    }


def _tiles(difference: _RunDifference) -> list[dict[str, object]]:
    counts = difference.counts
    counted = {line.verdict for line in difference.lines if line.counts}
    only = "failed" if counted & {ONLY_A, ONLY_B} else ""
    tiles = (
        ("values in either run", len(difference.lines), ""),
        ("the same", counts[SAME], ""),
        ("within tolerance", counts[WITHIN], ""),
        ("beyond tolerance", counts[BEYOND], "failed" if counts[BEYOND] else ""),
        ("only in one run", counts[ONLY_A] + counts[ONLY_B], only),
        ("times within noise", counts[NOISE], ""),
        ("times beyond noise", counts[SLOW], "failed" if SLOW in counted else ""),
    )
    return [{"label": label, "value": value, "mark": mark} for label, value, mark in tiles]


def _shown(line: _Line) -> dict[str, object]:
    return {
        "name": line.name.replace("_", " "),
        "key": line.name,
        "notes": line.notes,
        "first": _with_unit(line.first, line.unit),
        "second": _with_unit(line.second, line.unit),
        "change": line.change,
        "noise": _shown_noise(line),
        "verdict": line.verdict,
        "mark": "differs" if line.counts else _MARKS.get(line.verdict, ""),
    }


def _by_notebook(lines: Iterable[_Line]) -> dict[str, list[_Line]]:
    """The lines of each notebook, those that count first."""
    by_notebook: dict[str, list[_Line]] = {}
    for line in lines:
        by_notebook.setdefault(line.notebook, []).append(line)
    return {notebook: sorted(group, key=lambda line: not line.counts) for notebook, group in by_notebook.items()}


def _shown_noise(line: _Line) -> str:
    """The noise that a value was judged by, if its values differ."""
    return f"± {line.noise:,.3g}" if line.noise and line.verdict in (WITHIN, BEYOND) else ""
