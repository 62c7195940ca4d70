"""Expected values: judge a run by them, make them from runs, and say when two values are the same.

Also how a value is written for people, with its unit and tolerance: the notebooks, the report and the comparison of two
runs show it in the same way.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from helpers.runs import store
from helpers.runs.schema import _ExpectedValue
from helpers.runs.store import ResultError, _read_results, _read_status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from helpers.runs.schema import Value, _RecordedValue

FLOAT_FLOOR = 0.01  # another CPU rounds differently: floats are never expected closer than 1%
_TIME_UNITS = frozenset({"s", "ms", "µs", "us", "min", "h", "seconds", "minutes", "hours"})
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Judgement:
    """A run's values compared with the expected ones: how many are within tolerance, and a line for each other.

    ``missing`` are expected values that the run did not record; ``unmeasured`` counts recorded ones with nothing to
    compare with, which says nothing for or against them.
    """

    within: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    unmeasured: int

    @property
    def passed(self) -> bool:
        """True if no expected value differs or is missing."""
        return not self.differing and not self.missing

    def __str__(self) -> str:
        return (
            f"{self.within} as expected, {len(self.differing)} differ, {len(self.missing)} missing, "
            f"{self.unmeasured} unmeasured (nothing to compare with: not passed)"
        )


def judge(run_dir: Path, expected: Mapping[str, _ExpectedValue]) -> _Judgement:
    """Compare what a run recorded with the expected values, for the notebooks that the run is made of.

    Raises ResultError for a rehearsal, whose models are random.
    """
    _profile_of(run_dir)
    notebooks = _read_status(run_dir).notebooks
    values = dict(_values_by_key(run_dir))
    within, differing, missing = 0, [], []
    for key, entry in expected.items():
        # The run may leave out whole notebooks, whose values are not missing.
        if key.partition("/")[0] not in notebooks:
            continue
        if key not in values:
            missing.append(f"missing: {key}, expected {_format_value(entry.value)}")
        elif _matches(values[key].value, entry.value, entry.tolerance or 0):
            within += 1
        else:
            differing.append(_difference(key, values[key], entry))
    return _Judgement(within, tuple(differing), tuple(missing), len(values.keys() - expected.keys()))


def _profile_of(run: Path) -> str:
    """The profile of a run. Raises ResultError for a run of which nobody knows what it should give."""
    manifest = store.read_manifest(run)
    if manifest.rehearsal is not None:
        raise ResultError(f"{run} is a rehearsal, whose values say nothing about the models. Give a real run.")
    if manifest.of_own_notebooks:
        raise ResultError(f"{run} is a run of your own notebooks, for which there are no expected values.")
    return manifest.profile


def _values_by_key(run: Path) -> Iterator[tuple[str, _RecordedValue]]:
    for notebook, entries in _read_results(run).values.items():
        for name, entry in entries.items():
            yield f"{notebook}/{name}", entry


def _difference(key: str, entry: _RecordedValue, expected: _ExpectedValue) -> str:
    recorded = _with_unit(entry.value, entry.unit)
    wanted = _with_tolerance(expected.value, expected.tolerance, entry.unit)
    return f"differs: {key} is {recorded}, expected {wanted} ({expected.source})"


def expected_from_runs(run_dirs: Sequence[Path]) -> dict[str, _ExpectedValue]:
    """Return the expected values that several finished runs of one profile agree on.

    The value is the median. The tolerance of a float is twice the range over the runs, and at least 1% of the value,
    because another CPU rounds differently; integers that agree in all runs are exact, others get twice their range.
    Neither is under the tolerance that the notebook gave when it recorded the value. Texts and bools are kept if all
    runs agree. Times and speeds (units such as s or tokens/s) are left out: they belong to the machine. Only notebooks
    that passed count.

    Raises ResultError if the runs are of different profiles, hold no value, or one is a rehearsal.
    """
    runs = [Path(run) for run in run_dirs]
    if len({_profile_of(run) for run in runs}) != 1:
        raise ResultError("Expected values come from runs of one profile. Give runs of the same profile.")
    observed: dict[str, list[_RecordedValue]] = {}
    for run in runs:
        for key, entry in _reproducible(run):
            observed.setdefault(key, []).append(entry)
    source = "run " + ", ".join(run.name for run in runs)
    entries = {}
    for key in sorted(observed):
        summary = _summary(observed[key], source)
        if summary is not None:
            entries[key] = summary
    if not entries:
        raise ResultError("These runs recorded no reproducible value. Give runs whose notebooks passed.")
    return entries


def _reproducible(run: Path) -> Iterator[tuple[str, _RecordedValue]]:
    """What notebooks that passed recorded, and another machine could record too."""
    notebooks = _read_status(run).notebooks
    for key, entry in _values_by_key(run):
        status = notebooks.get(key.partition("/")[0])
        passed = status is not None and status.status == "passed"
        if passed and not _is_timing(entry.unit):
            yield key, entry


def _summary(entries: Sequence[_RecordedValue], source: str) -> _ExpectedValue | None:
    """The expected value that these recorded ones agree on; None if they do not."""
    numbers = [entry.value for entry in entries if _is_number(entry.value)]
    if len(numbers) < len(entries):
        if len({entry.value for entry in entries}) > 1:
            return None
        return _ExpectedValue(value=entries[0].value, tolerance=0, source=source)
    return _numeric_summary(numbers, max(entry.floor or 0 for entry in entries), source)


def _numeric_summary(numbers: Sequence[int | float], floor: float, source: str) -> _ExpectedValue:
    """The median with twice the range as its tolerance, which is not under ``floor``."""
    spread = max(floor, 2 * (max(numbers) - min(numbers)))
    median = statistics.median(numbers)
    if not all(isinstance(number, int) for number in numbers):
        return _ExpectedValue(value=median, tolerance=max(spread, FLOAT_FLOOR * abs(median)), source=source)
    # The median of an even number of integers is a float, also if it is whole.
    value = int(median) if median == int(median) else median
    return _ExpectedValue(value=value, tolerance=spread, source=source)


def _is_timing(unit: str) -> bool:
    """True for a unit of times, speeds and bandwidths (``s``, ``tokens/s``, ``GB/s``): they belong to the machine."""
    return unit in _TIME_UNITS or unit.endswith("/s")


def _is_number(value: object) -> TypeGuard[int | float]:
    """True for an int or a float, False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _matches(value: Value, expected: Value, tolerance: float) -> bool:
    """True if numbers differ by at most the absolute tolerance (rounding apart), or other values are equal."""
    if _is_number(value) and _is_number(expected):
        return abs(value - expected) <= tolerance + _ROUNDING * max(abs(value), abs(expected))
    return type(value) is type(expected) and value == expected


def _relative_change(first: Value | None, second: Value | None) -> str:
    """Format the change from one number to another: ``+1.5%``, or ``× 12`` from ten times on.

    Empty if they are equal or not numbers, or if the first is 0.
    """
    if not (_is_number(first) and _is_number(second)) or first in (0, second):
        return ""
    change = (second - first) / abs(first)
    if change >= 9 and first > 0:
        return f"× {second / first:,.3g}"
    return f"{100 * change:+.2g}%" if abs(change) < 0.1 else f"{change:+,.0%}"


def _format_value(value: Value | None) -> str:
    """Format a value for people: thousands separated, floats to six significant digits, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.6g}"


def _with_unit(value: Value | None, unit: str) -> str:
    """Format a value followed by its unit, if it has one."""
    if value is None:
        return _format_value(value)
    return f"{_format_value(value)} {unit}".rstrip()


def _with_tolerance(value: Value | None, tolerance: float | None, unit: str) -> str:
    """Format an expected value with its tolerance, if it has one."""
    margin = f" ± {tolerance:,.3g}" if tolerance else ""
    return _with_unit(value, f"{margin} {unit}".strip())
