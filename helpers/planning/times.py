"""The tables of a plan about time: what a laptop's notebooks take, and the estimated hours on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.units import gib
from helpers.planning.layout import _section, _table
from helpers.planning.plan import DECIMAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from helpers.planning.plan import _Hours, _Plan


def _time_table(plan: _Plan) -> RenderableType:
    table = _table(["notebook"], ["expected", "budget", "budget of a cell"])
    for name, budget in plan.budgets.items():
        expected = "not measured"
        if budget["expected"]:
            expected = f"{budget['expected']:,.0f}"
        table.add_row(name, expected, f"{budget['budget']:,.0f}", f"{budget['cell']:,.0f}")
    return _section("Time of the notebooks (seconds)", table)


def _hours_table(plan: _Plan) -> RenderableType:
    """Estimates by notebook and in total: a column for each card of the GPUs' size and each speed of the disk."""
    numbers = ["loads", "TB read"]
    for hour in plan.hours[0].times:
        numbers.append(f"{hour.card},\n{hour.disk / DECIMAL:g} GB/s")
    table = _table(["notebook"], [*numbers, "budget"])
    budgets = 0.0
    for hours in plan.hours:
        budget = plan.budgets[hours.notebook]["budget"] or 0.0
        _add_row(table, hours.notebook, [hours], budget)
        budgets += budget
    _add_row(table, "all", plan.hours, budgets)
    return _section("Hours of the notebooks, estimated: never measured on these GPUs", table, *_notes(plan.hours))


def _add_row(table: Table, name: str, several: Sequence[_Hours], budget: float) -> None:
    """A row for one notebook or for all of them: sums of loads, bytes and times."""
    times = []
    for column in zip(*(hours.times for hours in several), strict=True):
        times.append(_hours(sum(hour.seconds for hour in column)))
    loads, read = sum(hours.loads for hours in several), sum(hours.read_bytes for hours in several)
    table.add_row(name, str(loads), _terabytes(read), *times, _hours(budget))


def _notes(hours: Sequence[_Hours]) -> Iterator[str]:
    yield (
        "From the bytes that loads read, the tokens that are written and read, and the training steps that each "
        "notebook declares; helpers/planning/hours.py says what is assumed. A budget is three times the slowest."
    )
    written, read = sum(hour.written_bytes for hour in hours), sum(hour.read_bytes for hour in hours)
    unsaved, later = sum(hour.unsaved_bytes for hour in hours), sum(hour.later_bytes for hour in hours)
    if written:
        yield (
            f"Quantized copies are saved at the first load if the disk of .cache has {gib(written)} free for them. The "
            f"first run then reads {_terabytes(read)} TB, each later one {_terabytes(later)}; without copies, "
            f"every run reads {_terabytes(unsaved)}."
        )
    yield (
        "Linux keeps files that were read in memory that is free. A model read again soon comes from there if the "
        "machine has more memory than its files; the estimate does not count on it."
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"


def _terabytes(size: float) -> str:
    return f"{size / 1e12:.2f}"
