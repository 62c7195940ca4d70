"""The values that a run should give: judge a run by them, and make them from runs that agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import store
from helpers.schema import ExpectedValue, RecordedValue
from helpers.store import ResultError
from helpers.values import FLOAT_FLOOR, format_value, is_number, is_timing, matches, with_tolerance, with_unit


@dataclass(frozen=True)
class Judgement:
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


def judge(run_dir: Path, expected: Mapping[str, ExpectedValue]) -> Judgement:
    """Compare what a run recorded with the expected values, for the notebooks that the run is made of.

    Raises ResultError for a rehearsal, whose models are random.
    """
    _profile_of(run_dir)
    notebooks = store.read_status(run_dir).notebooks
    values = dict(_values_by_key(run_dir))
    within, differing, missing = 0, [], []
    for key, entry in expected.items():
        # The run may leave out whole notebooks, whose values are not missing.
        if key.partition("/")[0] not in notebooks:
            continue
        if key not in values:
            missing.append(f"missing: {key}, expected {format_value(entry.value)}")
        elif matches(values[key].value, entry.value, entry.tolerance or 0):
            within += 1
        else:
            differing.append(_difference(key, values[key], entry))
    return Judgement(within, tuple(differing), tuple(missing), len(values.keys() - expected.keys()))


def expected_from_runs(run_dirs: Sequence[Path]) -> dict[str, ExpectedValue]:
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
    observed: dict[str, list[RecordedValue]] = {}
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


def _profile_of(run: Path) -> str:
    """The profile of a run. Raises ResultError for a rehearsal: nobody knows what its models should give."""
    manifest = store.read_manifest(run)
    if manifest.rehearsal is not None:
        raise ResultError(f"{run} is a rehearsal, whose values say nothing about the models. Give a real run.")
    return manifest.profile


def _values_by_key(run: Path) -> Iterator[tuple[str, RecordedValue]]:
    for notebook, entries in store.read_results(run).values.items():
        for name, entry in entries.items():
            yield f"{notebook}/{name}", entry


def _reproducible(run: Path) -> Iterator[tuple[str, RecordedValue]]:
    """What notebooks that passed recorded, and another machine could record too."""
    notebooks = store.read_status(run).notebooks
    for key, entry in _values_by_key(run):
        status = notebooks.get(key.partition("/")[0])
        passed = status is not None and status.status == "passed"
        if passed and not is_timing(entry.unit):
            yield key, entry


def _summary(entries: Sequence[RecordedValue], source: str) -> ExpectedValue | None:
    """The expected value that these recorded ones agree on; None if they do not."""
    numbers = [entry.value for entry in entries if is_number(entry.value)]
    if len(numbers) < len(entries):
        if len({entry.value for entry in entries}) > 1:
            return None
        return ExpectedValue(value=entries[0].value, tolerance=0, source=source)
    floor = max(entry.floor or 0 for entry in entries)
    spread = max(floor, 2 * (max(numbers) - min(numbers)))
    median = statistics.median(numbers)
    if not all(isinstance(number, int) for number in numbers):
        return ExpectedValue(value=median, tolerance=max(spread, FLOAT_FLOOR * abs(median)), source=source)
    # The median of an even number of integers is a float, also if it is whole.
    value = int(median) if median == int(median) else median
    return ExpectedValue(value=value, tolerance=spread, source=source)


def _difference(key: str, entry: RecordedValue, expected: ExpectedValue) -> str:
    recorded = with_unit(entry.value, entry.unit)
    wanted = with_tolerance(expected.value, expected.tolerance, entry.unit)
    return f"differs: {key} is {recorded}, expected {wanted} ({expected.source})"
