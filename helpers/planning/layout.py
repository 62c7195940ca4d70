"""What the tables of a plan share: columns, notes below them, numbers as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table


def _table(texts: Sequence[str], numbers: Sequence[str], ends: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="underline")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in ends:
        table.add_column(name)
    return table


def _section(title: str, table: Table, *notes: str) -> RenderableType:
    """A table under its title and above its notes, which take the whole width."""
    from rich.console import Group as Together
    from rich.text import Text

    parts: list[RenderableType] = [Text(title, style="bold"), table]
    for note in notes:
        parts.append(Text(note, style="italic"))
    return Together(*parts)


def _gib(size: float) -> str:
    """GiB as a bare number: two decimals, four for small sizes."""
    if not size:
        return "0"
    decimals = 4
    if abs(size) > GIB / 10:
        decimals = 2
    return f"{size / GIB:,.{decimals}f}"


def _rate(value: float) -> str:
    """A positive number with three digits or more that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _counted(number: int, noun: str) -> str:
    """A number of things, such as "one sequence" or "3 sequences"."""
    if number == 1:
        return f"one {noun}"
    return f"{number} {noun}s"


def _series(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
