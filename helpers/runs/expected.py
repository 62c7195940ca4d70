"""Expected values: judge a run by them, make them from runs, and say when two values are the same.

Also how a value is written for people, with its unit and tolerance: the notebooks, the report and the comparison of two
runs show it in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from helpers.runs import store
from helpers.runs.holding import _status_now
from helpers.runs.origins import _commit, _origin, _same_code, _same_models, _source_notes
from helpers.runs.schema import _ExpectedValue, _Origin, _RecordedValue
from helpers.runs.store import ResultError, _read_results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from helpers.runs.schema import Value, _Manifest, _Results, _Status

    # The parameters that each notebook has if nobody gives one, by notebook.
    Usual = Mapping[str, Mapping[str, object]]

FLOAT_FLOOR = 0.01  # another CPU rounds differently: floats are never expected closer than 1%
_TIME_UNITS = frozenset({"s", "ms", "µs", "us", "min", "h", "seconds", "minutes", "hours"})
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Judgement:
    """A run's values compared with the expected ones: how many are within tolerance, and a line for each other.

    ``missing`` are expected values that the run did not record; ``unmeasured`` counts recorded ones with nothing to
    compare with, which says nothing for or against them. ``notes`` are what a reader has to know before: where the
    values come from, other parameters, a run that did not finish.
    """

    within: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    unmeasured: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if no expected value differs or is missing."""
        return not self.differing and not self.missing

    def __str__(self) -> str:
        return (
            f"{self.within} as expected, {len(self.differing)} differ, {len(self.missing)} missing, "
            f"{self.unmeasured} unmeasured (nothing to compare with: not passed)"
        )


def judge(run_dir: Path, expected: Mapping[str, _ExpectedValue], usual: Usual | None = None) -> _Judgement:
    """Compare what a run recorded with the expected values, for the notebooks that the run is made of.

    ``usual`` are the parameters that expected values belong to: a run that was given others is named as one.

    Raises ResultError for a rehearsal, whose models are random.
    """
    manifest, status = _real_run(run_dir), _status_now(run_dir)
    notebooks = status.notebooks
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
    notes = tuple(f"Note: {note}." for note in _notes(manifest, status, _read_results(run_dir), usual or {}))
    return _Judgement(within, tuple(differing), tuple(missing), len(values.keys() - expected.keys()), notes)


def _notes(manifest: _Manifest, status: _Status, recorded: _Results, usual: Usual) -> Iterator[str]:
    if status.state != "finished":
        yield f"The run did not finish: it is {status.state_text}"
    yield from _lost(status, recorded)
    yield from _source_notes(manifest)
    for notebook in status.notebooks:
        if others := _other_parameters(manifest, notebook, usual):
            yield f"{notebook} ran with other parameters than those of the expected values: {', '.join(others)}"


def _lost(status: _Status, recorded: _Results) -> list[str]:
    """The notebooks of which results.json holds fewer values than they recorded, a sentence each."""
    notes = []
    for name, entry in status.notebooks.items():
        there = len(recorded.values.get(name, {}))
        if entry.recorded is not None and there < entry.recorded:
            notes.append(
                f"{name} recorded {entry.recorded} values, and results.json holds {there} of them. Resume the run: "
                f"the notebook runs again"
            )
    return notes


def _other_parameters(manifest: _Manifest, notebook: str, usual: Usual) -> list[str]:
    """The parameters of a notebook that are not the usual ones, such as "seed = 5 (usually 0)"."""
    facts = manifest.notebooks.get(notebook)
    if facts is None or notebook not in usual:
        return []
    others = []
    for name, value in usual[notebook].items():
        if name in facts.parameters and facts.parameters[name] != value:
            others.append(f"{name} = {facts.parameters[name]!r} (usually {value!r})")
    return others


def _real_run(run: Path) -> _Manifest:
    """The manifest of a run. Raises ResultError for a rehearsal: nobody knows what its models should give.

    Raises it for a run of a reader's own notebooks too.
    """
    manifest = store.read_manifest(run)
    if manifest.rehearsal is not None:
        raise ResultError(f"{run} is a rehearsal, whose values say nothing about the models. Give a real run.")
    if manifest.of_own_notebooks:
        raise ResultError(f"{run} is a run of your own notebooks, for which there are no expected values.")
    return manifest


def _values_by_key(run: Path) -> Iterator[tuple[str, _RecordedValue]]:
    for notebook, entries in _read_results(run).values.items():
        for name, entry in entries.items():
            yield f"{notebook}/{name}", entry


def _difference(key: str, entry: _RecordedValue, expected: _ExpectedValue) -> str:
    recorded = _with_unit(entry.value, entry.unit)
    wanted = _with_tolerance(expected.value, expected.tolerance, entry.unit)
    return f"differs: {key} is {recorded}, expected {wanted} ({expected.source})"


@dataclass(frozen=True)
class _Observed:
    """A recorded value with the run that it is of, and where it comes from."""

    run: Path
    entry: _RecordedValue
    origin: _Origin | None


def expected_from_runs(run_dirs: Sequence[Path], usual: Usual | None = None) -> dict[str, _ExpectedValue]:
    """Return the expected values that several finished runs of one profile agree on.

    The value is the median. The tolerance of a float is twice the range over the runs, and at least 1% of the value,
    because another CPU rounds differently; integers that agree in all runs are exact, others get twice their range.
    Neither is under the tolerance that the notebook gave when it recorded the value. Texts and bools are kept if all
    runs agree. Times and speeds (units such as s or tokens/s) are left out: they belong to the machine. Only notebooks
    that passed count. The source of a value names the runs, and the commit that gave it.

    ``usual`` are the parameters of runs that were given none. Raises ResultError if the runs are of different profiles,
    hold no value, or one is a rehearsal, lost values or had other parameters; and if a notebook's values come from
    different code or models, which a tolerance must not hide.
    """
    runs = [Path(run) for run in run_dirs]
    if len({_real_run(run).profile for run in runs}) != 1:
        raise ResultError("Expected values come from runs of one profile. Give runs of the same profile.")
    for run in runs:
        _check_whole(run, usual or {})
    entries = {}
    for key, observed in sorted(_observed_by_key(runs).items()):
        _check_origins(key, observed)
        summary = _summary([value.entry for value in observed], _source(runs, observed))
        if summary is not None:
            entries[key] = summary
    if not entries:
        raise ResultError("These runs recorded no reproducible value. Give runs whose notebooks passed.")
    return entries


def _observed_by_key(runs: Sequence[Path]) -> dict[str, list[_Observed]]:
    observed: dict[str, list[_Observed]] = {}
    for run in runs:
        for key, value in _reproducible(run):
            observed.setdefault(key, []).append(value)
    return observed


def _check_whole(run: Path, usual: Usual) -> None:
    """Raise ResultError for a run that goes on, that lost values, or that had other parameters than one given none."""
    manifest, status = store.read_manifest(run), _status_now(run)
    if status.state == "running":
        raise ResultError(f"{run}: the run is still going. Wait until it has finished.")
    for note in _lost(status, _read_results(run)):
        raise ResultError(f"{run}: {note}.")
    for notebook in status.notebooks:
        if others := _other_parameters(manifest, notebook, usual):
            raise ResultError(
                f"{run}: {notebook} ran with {', '.join(others)}. Expected values are those of the usual parameters: "
                "give a run without -p."
            )


def _check_origins(key: str, observed: Sequence[_Observed]) -> None:
    """Raise ResultError if the runs' values come from different code or models, as far as that is known."""
    first = observed[0]
    for other in observed[1:]:
        if first.origin is None or other.origin is None:
            continue
        code = _same_code(first.origin, other.origin)
        if code and _same_models(first.origin, other.origin):
            continue
        what = "files of the models" if code else f"code ({_commit(first.origin.git)} and {_commit(other.origin.git)})"
        raise ResultError(
            f"{key} comes from different {what} in {first.run} and {other.run}. Give runs of the same, or run again "
            "what is older: workbook run --resume RUN --redo."
        )


def _source(runs: Sequence[Path], observed: Sequence[_Observed]) -> str:
    """Where an expected value comes from: the runs, and the commits that their values are of if they are known."""
    origins = [value.origin for value in observed if value.origin is not None and value.origin.git.commit]
    commits = dict.fromkeys(_commit(origin.git) for origin in origins)
    at = f" (commit {', '.join(commits)})" if commits else ""
    return "run " + ", ".join(run.resolve().name for run in runs) + at


def _reproducible(run: Path) -> Iterator[tuple[str, _Observed]]:
    """What notebooks that passed recorded, and another machine could record too."""
    manifest, notebooks = store.read_manifest(run), _status_now(run).notebooks
    for key, entry in _values_by_key(run):
        notebook = key.partition("/")[0]
        passed = notebook in notebooks and notebooks[notebook].status == "passed"
        if passed and not _is_timing(entry.unit):
            yield key, _Observed(run, entry, _origin(manifest, notebook))


@dataclass(frozen=True)
class _Merged:
    """The expected values after an update, and a line for each that was added, changed or dropped."""

    values: Mapping[str, _ExpectedValue]
    lines: tuple[str, ...]
    measured: int
    runs: int
    kept: int
    cited: int

    def __str__(self) -> str:
        return (
            f"{self.measured} values from {self.runs} run{'s' if self.runs > 1 else ''}, {self.kept} kept of other "
            f"notebooks, {self.cited} from citations"
        )


def merge_expected(
    earlier: Mapping[str, _ExpectedValue], measured: Mapping[str, _ExpectedValue], runs: Sequence[Path]
) -> _Merged:
    """The earlier expected values, updated by what runs gave.

    Values from citations are kept, and so are those of notebooks that did not pass in these runs. A notebook that did
    pass has the values that it recorded now: what it no longer records, or the runs do not agree on, is dropped.
    """
    again = {key.partition("/")[0] for run in runs for key, _ in _reproducible(Path(run))}
    cited = {key: entry for key, entry in earlier.items() if entry.cited}
    kept = {key: entry for key, entry in earlier.items() if key.partition("/")[0] not in again and key not in cited}
    values = {**kept, **measured, **cited}
    lines = tuple(_changes(earlier, values))
    return _Merged(values, lines, len(measured.keys() - cited.keys()), len(runs), len(kept), len(cited))


def _changes(earlier: Mapping[str, _ExpectedValue], later: Mapping[str, _ExpectedValue]) -> Iterator[str]:
    """Yield a line for each value that an update adds, changes or drops, in the order of their names."""
    for key in sorted({*earlier, *later}):
        if key not in later:
            was = _shown(earlier[key])
            yield f"dropped: {key}, which these runs do not record or do not agree on, was {was}"
        elif key not in earlier:
            yield f"added: {key}, {_shown(later[key])}"
        elif _shown(earlier[key]) != _shown(later[key]):
            yield f"changed: {key}, from {_shown(earlier[key])} to {_shown(later[key])}"


def _shown(entry: _ExpectedValue) -> str:
    return _with_tolerance(entry.value, entry.tolerance, "")


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
