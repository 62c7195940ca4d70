"""Record a value or a figure of a run, beside what was expected.

A run folder, ``runs/<UTC time>-<profile>/``, holds::

    manifest.json   what ran: versions, hardware, models, seeds, parameters, hashes, command, times (by the runner)
    status.json     the state of each notebook, kept up to date while it runs (by the runner)
    results.json    what the notebooks recorded (by this module)
    notebooks/      the executed notebooks            figures/   <notebook>_<name>.png
    logs/           what a notebook's process wrote   report.html, html/<notebook>.html

``results.json`` keeps the order of recording::

    {"values":  {"<notebook>": {"<name>": {"value": .., "unit": "..", "claim": "A1" or null, "expected": ..,
                                           "tolerance": .., "source": "..", "verdict": "..", "floor": .. or null,
                                           "agrees": true, false or null, "model": ".." or null}}},
     "figures": {"<notebook>": {"<name>": "figures/<notebook>_<name>.png"}}}

Expected values stand in ``notebooks/expected/<profile>.json``::

    {"<notebook>/<name>": {"value": .., "tolerance": .., "source": "run .." or "citation .."}}

with an absolute tolerance; ``floor`` is the least that a tolerance made from this run may be. A verdict is "as
expected", "differs" or "unmeasured" (nothing to compare with; this never counts as passed). ``agrees`` answers another
question: whether the value agrees with the article's statement ``claim``. ``model`` is the label of the model that it
was measured on. The runner names the run to a notebook through environment variables: ``WORKBOOK_RUN_DIR``,
``WORKBOOK_NOTEBOOK``, ``WORKBOOK_PROFILE``, ``WORKBOOK_EXPECTED`` (the file above) and ``WORKBOOK_UNATTENDED``. Without
them values are compared and shown, and kept only in memory.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from helpers.types import ROOT, WorkbookError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Value = bool | int | float | str

AS_EXPECTED, DIFFERS, UNMEASURED = "as expected", "differs", "unmeasured"
TIME_UNITS = frozenset({"s", "ms", "µs", "us", "min", "h", "seconds", "minutes", "hours"})
FLOAT_FLOOR = 0.01
ROUNDING = 1e-9
VERDICT_COLOURS = {AS_EXPECTED: "#00805a", DIFFERS: "#c0392b", UNMEASURED: "#777777"}

_session: dict[str, dict[str, Record]] = {}


class ResultError(WorkbookError):
    """A value that cannot be recorded, or a results file that cannot be read."""


@dataclass(frozen=True)
class Record:
    """One recorded value beside the expected one. Shows itself as a line in a notebook."""

    name: str
    value: Value
    unit: str = ""
    claim: str | None = None
    expected: Value | None = None
    tolerance: float | None = None
    source: str | None = None
    verdict: str = UNMEASURED
    floor: float | None = None
    agrees: bool | None = None
    model: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {with_unit(self.value, self.unit)} | {self._expectation()} | {self.verdict}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour = VERDICT_COLOURS[self.verdict]
        claim = f" (claim {html.escape(self.claim)})" if self.claim else ""
        return (
            f'<div style="border-left:4px solid {colour};padding:2px 10px">{html.escape(self.name)}{claim}: '
            f"<b>{html.escape(with_unit(self.value, self.unit))}</b>, {html.escape(self._expectation())}: "
            f'<b style="color:{colour}">{self.verdict}</b></div>'
        )

    def _expectation(self) -> str:
        if self.verdict == UNMEASURED:
            return "no expected value"
        return f"expected {with_tolerance(self.expected, self.tolerance, self.unit)}"


def format_value(value: Value | None) -> str:
    """A value for people: thousands separated, floats to six significant digits, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def with_unit(value: Value | None, unit: str) -> str:
    """A formatted value followed by its unit, if it has one."""
    if value is None:
        return format_value(value)
    return f"{format_value(value)} {unit}".rstrip()


def with_tolerance(value: Value | None, tolerance: float | None, unit: str) -> str:
    """An expected value with its tolerance, if it has one."""
    margin = f" ± {tolerance:,.3g}" if tolerance else ""
    return with_unit(value, f"{margin} {unit}".strip())


def is_timing(unit: str) -> bool:
    """True for a unit of times, speeds and bandwidths (``s``, ``tokens/s``, ``GB/s``): they belong to the machine."""
    return unit in TIME_UNITS or unit.endswith("/s")


def unattended() -> bool:
    """True in a run by ``workbook run``: nobody is there to click on a widget."""
    return os.environ.get("WORKBOOK_UNATTENDED") == "1"


def record(
    name: str,
    value: Any,
    unit: str = "",
    claim: str | None = None,
    *,
    tolerance: float | None = None,
    agrees: bool | None = None,
    model: str | None = None,
) -> Record:
    """Compare a value with the expected one and keep it in the run's ``results.json``.

    ``value`` is a number, a text or a bool (numpy and torch scalars too); ``claim`` names a statement of the source
    article, such as "A1". ``tolerance``, in the value's unit, is the least that ``expected_from_runs`` allows a number:
    give it where a hundredth of the value is finer than the value's own meaning, as for a difference near zero.
    ``agrees`` says whether the value agrees with that statement as published; None: it only illustrates it. ``model``
    is the ``ModelRef.label`` of the model it was measured on; None: it was computed from published configurations.
    A name recorded again in the same notebook replaces the earlier value.
    Raises ResultError for an empty name, any other type, NaN and infinity, a tolerance that is no distance, and
    ``agrees`` without a claim.
    """
    if not name.strip():
        raise ResultError("a recorded value needs a name")
    checked = _scalar(name, value)
    if tolerance is not None and not (is_number(checked) and 0 <= tolerance < math.inf):
        raise ResultError(f"{name!r} cannot have the tolerance {tolerance}: give a number a finite one from 0 up")
    if agrees is not None and claim is None:
        raise ResultError(f"{name!r} agrees with nothing: name the claim that it is judged by")
    judged = None if agrees is None else bool(agrees)  # numpy's truth values are no JSON
    expected = _expected_values().get(f"{_notebook()}/{name}")
    comparison = _comparison(checked, expected)
    entry = Record(name, checked, unit, claim, **comparison, floor=tolerance, agrees=judged, model=model)
    _keep(entry)
    return entry


def record_figure(name: str, figure: Figure) -> Figure:
    """Save a figure as ``figures/<notebook>_<name>.png`` of the run and return it, so that the cell shows it."""
    run = _run_folder()
    if run is not None:
        path = run / "figures" / f"{_notebook()}_{re.sub(r'[^a-zA-Z0-9.-]+', '-', name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        with changed(run) as data:
            data["figures"].setdefault(_notebook(), {})[name] = path.relative_to(run).as_posix()
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)  # otherwise the inline backend shows a pyplot figure a second time
    return figure


def recorded() -> DataFrame:
    """A table of what this notebook recorded, beside the expected values."""
    import pandas as pd

    run = _run_folder()
    entries = read(run)["values"].get(_notebook(), {}) if run else _session.get(_notebook(), {})
    records = [entry if isinstance(entry, Record) else Record(name, **entry) for name, entry in entries.items()]
    rows = [
        {
            "value": with_unit(entry.value, entry.unit),
            "expected": with_tolerance(entry.expected, entry.tolerance, entry.unit),
            "verdict": entry.verdict,
            "claim": entry.claim or "",
        }
        for entry in records
    ]
    index = pd.Index([entry.name for entry in records], name="name")
    return pd.DataFrame(rows, index=index, columns=["value", "expected", "verdict", "claim"])


def read(run_dir: Path) -> dict[str, Any]:
    """The content of a run's ``results.json``; empty when nothing was recorded. Raises ResultError when damaged."""
    path = run_dir / "results.json"
    if not path.exists():
        return {"values": {}, "figures": {}}
    return read_json(path)


@contextmanager
def changed(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The content of ``results.json``, to be changed in place; written back atomically, one process at a time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / ".results.lock"):
        data = read(run_dir)
        yield data
        write_json(run_dir / "results.json", data)


def forget(run_dir: Path, notebook: str) -> None:
    """Drop what a notebook recorded, before it runs again."""
    with changed(run_dir) as data:
        data["values"].pop(notebook, None)
        for figure in data["figures"].pop(notebook, {}).values():
            (run_dir / figure).unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ResultError, naming the file, when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"there is no {path}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not valid JSON ({error}): delete it or restore it") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically: a reader sees the old content or the new, never a part of it."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def expected_from_runs(run_dirs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The expected values that several finished runs of one profile agree on.

    The value is the median. The tolerance of a float is twice the range over the runs, and at least 1% of the value,
    because another processor rounds differently; integers that agree in all runs are exact, others get twice their
    range. Neither is under the tolerance that the notebook gave when it recorded the value. Texts and bools are kept
    where all runs agree. Times and speeds (units such as s or tokens/s) are left out: they belong to the machine. Only
    notebooks that passed count.

    Raises ResultError when the runs are of different profiles, hold no value, or one is a rehearsal.
    """
    runs = [Path(run) for run in run_dirs]
    if len({_profile_of(run) for run in runs}) != 1:
        raise ResultError("expected values come from runs of one profile: give runs of the same profile")
    observed: dict[str, list[Value]] = {}
    floors: dict[str, float] = {}
    for run in runs:
        for key, entry in _portable_entries(run):
            observed.setdefault(key, []).append(entry["value"])
            floors[key] = max(floors.get(key, 0), entry.get("floor") or 0)
    source = "run " + ", ".join(run.name for run in runs)
    entries = {
        key: _summary(values, floors[key]) | {"source": source} for key, values in observed.items() if _agree(values)
    }
    if not entries:
        raise ResultError("these runs recorded no value that another machine could repeat")
    return dict(sorted(entries.items()))


@dataclass(frozen=True)
class Judgement:
    """A run's values beside the expected ones: how many are within tolerance, and a line for each that is not.

    ``missing`` are expected values that the run did not record; ``unmeasured`` counts recorded ones with nothing to
    compare with, which says nothing for or against them.
    """

    within: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    unmeasured: int

    def __str__(self) -> str:
        return (
            f"{self.within} as expected, {len(self.differing)} differ, {len(self.missing)} missing, "
            f"{self.unmeasured} unmeasured (nothing to compare with: not passed)"
        )


def judge(run_dir: Path, expected: Mapping[str, Mapping[str, Any]]) -> Judgement:
    """Compare what a run recorded with ``expected`` (see above), for the notebooks that the run is made of.

    Raises ResultError for a rehearsal, whose models are random.
    """
    _profile_of(run_dir)
    found = {
        f"{notebook}/{name}": entry
        for notebook, entries in read(run_dir)["values"].items()
        for name, entry in entries.items()
    }
    notebooks = read_json(run_dir / "status.json")["notebooks"]
    wanted = {key: entry for key, entry in expected.items() if key.partition("/")[0] in notebooks}
    differing = [
        f"differs: {key} is {with_unit(found[key]['value'], found[key]['unit'])}, expected "
        f"{with_tolerance(entry['value'], entry.get('tolerance'), found[key]['unit'])} ({entry['source']})"
        for key, entry in wanted.items()
        if key in found and not matches(found[key]["value"], entry["value"], entry.get("tolerance") or 0)
    ]
    missing = [f"missing: {key}, expected {format_value(e['value'])}" for key, e in wanted.items() if key not in found]
    within = len(wanted) - len(differing) - len(missing)
    return Judgement(within, tuple(differing), tuple(missing), len(found.keys() - wanted.keys()))


def _profile_of(run: Path) -> str:
    """The profile of a run. Raises ResultError for a rehearsal: nobody knows what its models should give."""
    manifest = read_json(run / "manifest.json")
    if "rehearsal" in manifest:
        raise ResultError(f"{run} is a rehearsal, whose values say nothing about the models: give a real run")
    return manifest["profile"]


def _portable_entries(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    status = read_json(run / "status.json")["notebooks"]
    for notebook, entries in read(run)["values"].items():
        if status.get(notebook, {}).get("status") != "passed":
            continue
        for name, entry in entries.items():
            if not is_timing(entry["unit"]):
                yield f"{notebook}/{name}", entry


def is_number(value: Any) -> bool:
    """True for an int or a float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _agree(values: Sequence[Value]) -> bool:
    return all(is_number(value) for value in values) or len(set(values)) == 1


def _summary(values: Sequence[Value], floor: float) -> dict[str, Any]:
    if not is_number(values[0]):
        return {"value": values[0], "tolerance": 0}
    median, spread = statistics.median(values), max(floor, 2 * (max(values) - min(values)))
    if all(isinstance(value, int) for value in values):
        return {"value": int(median) if median == int(median) else median, "tolerance": spread}
    return {"value": median, "tolerance": max(spread, FLOAT_FLOOR * abs(median))}


def _comparison(value: Value, expected: Mapping[str, Any] | None) -> dict[str, Any]:
    if expected is None:
        return {}
    same = matches(value, expected["value"], expected.get("tolerance") or 0)
    return {
        "expected": expected["value"],
        "tolerance": expected.get("tolerance"),
        "source": expected.get("source"),
        "verdict": AS_EXPECTED if same else DIFFERS,
    }


def matches(value: Value, expected: Value, tolerance: float) -> bool:
    """True when numbers differ by at most the absolute tolerance (rounding apart), or other values are equal."""
    if is_number(value) and is_number(expected):
        return abs(value - expected) <= tolerance + ROUNDING * max(abs(value), abs(expected))
    return type(value) is type(expected) and value == expected


def _scalar(name: str, value: Any) -> Value:
    item = value
    if hasattr(value, "item"):
        with suppress(TypeError, ValueError, RuntimeError):
            item = value.item()
    if not isinstance(item, bool | int | float | str):
        raise ResultError(f"{name!r} is a {type(value).__name__}: record a number, a text or a bool, one at a time")
    if isinstance(item, float) and not math.isfinite(item):
        raise ResultError(f"{name!r} is {item}: record a finite number, or a text that says why there is none")
    return item


def _keep(entry: Record) -> None:
    _session.setdefault(_notebook(), {})[entry.name] = entry
    if (run := _run_folder()) is not None:
        fields = asdict(entry)
        with changed(run) as data:
            data["values"].setdefault(_notebook(), {})[fields.pop("name")] = fields


def work_folder(name: str) -> Path:
    """Where a notebook keeps work that an interrupt must not lose: in its run's folder, or in ``runs/work``."""
    return (_run_folder() or ROOT / "runs") / "work" / name


def _run_folder() -> Path | None:
    folder = os.environ.get("WORKBOOK_RUN_DIR")
    return Path(folder) if folder else None


def _notebook() -> str:
    """The notebook's name; Jupyter's own servers tell the kernel its path through JPY_SESSION_NAME."""
    return os.environ.get("WORKBOOK_NOTEBOOK") or Path(os.environ.get("JPY_SESSION_NAME", "notebook")).stem


def _expected_values() -> dict[str, Any]:
    default = ROOT / "notebooks" / "expected" / f"{_profile()}.json"
    path = Path(os.environ.get("WORKBOOK_EXPECTED", default))
    return read_json(path) if path.exists() else {}


def _profile() -> str:
    """The profile's name: the run's, or what the open notebook calls ``profile``, or laptop."""
    if named := os.environ.get("WORKBOOK_PROFILE"):
        return named
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    chosen = shell.user_ns.get("profile", "laptop") if shell else "laptop"
    return chosen if isinstance(chosen, str) else str(getattr(chosen, "name", "laptop"))
