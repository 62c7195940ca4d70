"""The values of two runs compared, one by one: which differ by more than their noise.

Noise, for each value:

- a number: the larger of the two runs' tolerances, which are twice what runs of one profile lay apart (see
  ``expected.expected_from_runs``). If neither run recorded one, that of its profile's expected value; if there is none
  either, whole numbers are exact and others may differ by 1%;
- a time, speed or bandwidth: a factor of two, because the machine may do other work. Beyond it is shown, and counts as
  a difference only with ``strict_times``;
- a text, yes or no: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.runs.expected import FLOAT_FLOOR, _format_value, _is_number, _is_timing, _matches, _relative_change
from helpers.runs.schema import Value, _ExpectedValue, _Manifest, _RecordedValue, _Status

SAME, WITHIN, BEYOND = "the same", "within tolerance", "beyond tolerance"
NOISE, SLOW = "machine noise", "beyond machine noise"
ONLY_A, ONLY_B = "only in A", "only in B"
_MACHINE_FACTOR = 2.0


@dataclass(frozen=True)
class _Line:
    """One value of both runs; None if a run did not record it.

    ``noise`` is the absolute distance that counts as none; None if there is no such number. ``counts`` says whether
    the line is a difference; ``notes`` name what else changed: unit, model, judgement of a claim.
    """

    notebook: str
    name: str
    unit: str
    first: Value | None
    second: Value | None
    noise: float | None
    verdict: str
    counts: bool
    notes: tuple[str, ...] = ()

    @property
    def change(self) -> str:
        """The change from A to B, relative to A."""
        return _relative_change(self.first, self.second)


@dataclass(frozen=True)
class _Run:
    """The files of one of the two runs, and the expected values of its profile."""

    folder: Path
    manifest: _Manifest
    status: _Status
    values: Mapping[str, Mapping[str, _RecordedValue]]
    expected: Mapping[str, _ExpectedValue]

    @property
    def rehearsed(self) -> bool:
        return self.manifest.rehearsal is not None


@dataclass(frozen=True)
class _Entries:
    """What the two runs recorded under one name, and what their profiles expect of it."""

    notebook: str
    name: str
    first: _RecordedValue | None
    second: _RecordedValue | None
    expected: tuple[_ExpectedValue, ...]

    @property
    def recorded(self) -> list[_RecordedValue]:
        # One or two of them, because a name that neither run recorded is not compared.
        return [entry for entry in (self.first, self.second) if entry is not None]

    @property
    def timing(self) -> bool:
        return all(_is_timing(entry.unit) for entry in self.recorded)


def _lines(first: _Run, second: _Run, shared: Sequence[str], strict_times: bool) -> Iterator[_Line]:
    """A line for each value that either run recorded in a notebook that both ran."""
    for notebook in shared:
        values_a, values_b = first.values.get(notebook, {}), second.values.get(notebook, {})
        for name in {**values_a, **values_b}:
            key = f"{notebook}/{name}"
            expected = tuple(run.expected[key] for run in (first, second) if key in run.expected)
            entries = _Entries(notebook, name, values_a.get(name), values_b.get(name), expected)
            yield _line(entries, strict_times)


def _line(entries: _Entries, strict_times: bool) -> _Line:
    first, second = entries.first, entries.second
    noise = None if entries.timing else _noise(entries)
    verdict = _verdict(entries, noise)
    differs = verdict not in (SAME, WITHIN, NOISE)
    return _Line(
        notebook=entries.notebook,
        name=entries.name,
        unit=entries.recorded[-1].unit,
        first=None if first is None else first.value,
        second=None if second is None else second.value,
        noise=noise,
        verdict=verdict,
        counts=differs and (strict_times or not entries.timing),
        notes=tuple(_notes(first, second)),
    )


def _verdict(entries: _Entries, noise: float | None) -> str:
    if entries.first is None:
        return ONLY_B
    if entries.second is None:
        return ONLY_A
    first, second = entries.first.value, entries.second.value
    # Numbers of two units cannot be compared, also if they are equal.
    if entries.first.unit != entries.second.unit:
        return BEYOND
    if _matches(second, first, 0):
        return SAME
    if entries.timing and _is_number(first) and _is_number(second):
        return _timing_verdict(first, second)
    return WITHIN if _matches(second, first, noise or 0) else BEYOND


def _timing_verdict(first: float, second: float) -> str:
    low, high = sorted((first, second))
    return NOISE if 0 < high <= _MACHINE_FACTOR * low else SLOW


def _noise(entries: _Entries) -> float | None:
    """How far apart the values may lie; None if one of them is not a number."""
    numbers = [entry.value for entry in entries.recorded if _is_number(entry.value)]
    if len(numbers) < len(entries.recorded):
        return None
    tolerance = _given_tolerance(entries)
    if tolerance is not None:
        return tolerance
    if all(isinstance(number, int) for number in numbers):
        return 0
    return FLOAT_FLOOR * max(map(abs, numbers))


def _given_tolerance(entries: _Entries) -> float | None:
    """The largest tolerance that the runs recorded; if none, the largest that their profiles expect today."""
    own: list[float | None] = []
    for entry in entries.recorded:
        own += [entry.tolerance, entry.floor]
    for tolerances in (own, [entry.tolerance for entry in entries.expected]):
        given = [tolerance for tolerance in tolerances if tolerance is not None]
        if given:
            return max(given)
    return None


def _notes(first: _RecordedValue | None, second: _RecordedValue | None) -> Iterator[str]:
    """What else changed: unit, model, judgement of a claim."""
    if first is None or second is None:
        return
    for what, earlier, later in (("unit", first.unit, second.unit), ("model", first.model, second.model)):
        if earlier != later:
            yield f"{what}: {earlier or 'none'} → {later or 'none'}"
    if first.agrees != second.agrees:
        yield f"agrees with {second.claim or first.claim}: {_judgement(first)} → {_judgement(second)}"


def _judgement(entry: _RecordedValue) -> str:
    return "not judged" if entry.agrees is None else _format_value(entry.agrees)
