"""Two runs side by side: which values differ by more than their noise, and what else was not the same.

Noise, for each value:

- a number: the larger of the two runs' tolerances, which are twice what runs of one profile lay apart (see
  ``results.expected_from_runs``). Where neither run recorded one, it is looked up among its profile's expected values;
  where there is none either, whole numbers are exact and others may differ by 1%;
- a time, speed or bandwidth: a factor of two, because the machine may do other work. Beyond it is shown, and counts as
  a difference only with ``strict_times``;
- a text, yes or no: none.

A value that only one run recorded, of a notebook that both ran, is a difference, and so is another status of such a
notebook. Versions, parameters, sources, models and machines explain differences, and are none themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import results
from helpers.report import ROLES, duration, ledger, machine, page
from helpers.results import Value
from helpers.runner import NOTEBOOKS, read_manifest, read_status
from helpers.types import WorkbookError, gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

SAME, WITHIN, BEYOND = "the same", "within tolerance", "beyond tolerance"
NOISE, SLOW = "machine noise", "beyond machine noise"
ONLY_A, ONLY_B = "only in A", "only in B"
VERDICTS = (SAME, WITHIN, BEYOND, NOISE, SLOW, ONLY_A, ONLY_B)
MACHINE_FACTOR = 2.0
NONE = "–"


class DifferenceError(WorkbookError):
    """Two runs that cannot be compared, or a page that cannot be written."""


@dataclass(frozen=True)
class Line:
    """One value of both runs; None where a run did not record it.

    ``noise`` is the absolute distance that counts as none; None where there is no such number. ``counts`` says whether
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
        return relative_change(self.first, self.second)


@dataclass(frozen=True)
class Pair:
    """One fact of both runs, as text; a dash where a run has none."""

    what: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether the runs are unlike in this."""
        return self.first != self.second


@dataclass(frozen=True)
class Difference:
    """Two runs compared; A is the one to compare with.

    ``facts`` say what ran and where; ``statuses`` and ``times`` hold a pair for each notebook of either run;
    ``changes`` are other parameters, notebooks, models and packages, by group; ``claims`` those with another verdict.
    """

    run_a: Path
    run_b: Path
    warnings: tuple[str, ...]
    facts: tuple[Pair, ...]
    statuses: tuple[Pair, ...]
    times: tuple[Pair, ...]
    lines: tuple[Line, ...]
    changes: Mapping[str, tuple[Pair, ...]]
    claims: tuple[Pair, ...]

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two folders."""
        return self.run_a.resolve().name, self.run_b.resolve().name

    @property
    def counts(self) -> Counter[str]:
        """How many values have each verdict."""
        return Counter(line.verdict for line in self.lines)

    @property
    def differing(self) -> int:
        """How many values, and statuses of notebooks that both ran, are differences."""
        statuses = sum(pair.differs and NONE not in (pair.first, pair.second) for pair in self.statuses)
        return sum(line.counts for line in self.lines) + statuses

    @property
    def outcome(self) -> str:
        """The outcome in a few words."""
        number = self.differing
        return f"{number or 'no'} difference{'s' if number > 1 else ''} beyond tolerance"


def compare(run_a: Path, run_b: Path, *, strict_times: bool = False) -> Difference:
    """Compare two run folders; with ``strict_times``, times beyond the machine's noise are differences too.

    Raises RunFolderError for a folder without a run, ResultError for damaged files, and DifferenceError for a rehearsal
    beside a real run and for runs that share no notebook.
    """
    runs = run_a, run_b
    manifests, statuses = [read_manifest(run) for run in runs], [read_status(run) for run in runs]
    rehearsed = [run for run, manifest in zip(runs, manifests, strict=True) if "rehearsal" in manifest]
    if len(rehearsed) == 1:
        raise DifferenceError(f"{rehearsed[0]} is a rehearsal and the other run is not: give two of a kind")
    entries_a, entries_b = (status["notebooks"] for status in statuses)
    shared = [name for name in entries_a if name in entries_b]
    if not shared:
        raise DifferenceError(f"the runs share no notebook: A has {', '.join(entries_a)}; B has {', '.join(entries_b)}")
    return Difference(
        run_a,
        run_b,
        warnings=tuple(_warnings(manifests, statuses)),
        facts=_pairs(*map(_facts, manifests, statuses)),
        statuses=_pairs(*(_of_notebooks(status, lambda entry: entry["status"]) for status in statuses)),
        times=_pairs(*(_of_notebooks(status, lambda entry: duration(entry["seconds"])) for status in statuses)),
        lines=tuple(_lines(runs, manifests, shared, strict_times)),
        changes=_changes(manifests, statuses, shared),
        claims=_unlike(_pairs(*map(_verdicts, runs))),
    )


def relative_change(first: Value | None, second: Value | None) -> str:
    """``+1.5%`` from one number to another, ``× 12`` from ten times on; "" where equal, not numbers, or from 0."""
    if not (results.is_number(first) and results.is_number(second)) or first in (0, second):
        return ""
    change = (second - first) / abs(first)
    if change >= 9 and first > 0:
        return f"× {second / first:,.3g}"
    return f"{100 * change:+.2g}%" if abs(change) < 0.1 else f"{change:+,.0%}"


def write_page(found: Difference, target: Path | None = None) -> Path:
    """Write the comparison as an HTML page, by default ``diff-<A>.html`` in B's folder, and return its path.

    Raises DifferenceError where it cannot be written.
    """
    target = target or found.run_b / f"diff-{found.names[0]}.html"
    try:
        results.write_text(target, page("difference.html.j2", _context(found)))
    except OSError as error:
        raise DifferenceError(f"cannot write {target} ({error.strerror}): name another file with --html") from error
    return target


def tables(found: Difference) -> Iterator[RenderableType]:
    """The comparison in parts, for a terminal of 80 columns or more; the outcome comes last."""
    from rich.text import Text

    for warning in found.warnings:
        yield Text(f"Note: {warning}", style="yellow")
    runs = _table("The runs", "", "A", "B")
    for pair in (Pair("Run", *found.names), *found.facts):
        runs.add_row(pair.what, *_texts(pair))
    yield runs
    notebooks = _table("Notebooks", "", "A", "B", "time A", "time B")
    for status, time in zip(found.statuses, found.times, strict=True):
        notebooks.add_row(status.what, *_texts(status), time.first, time.second)
    yield notebooks
    for notebook, lines in _by_notebook(found.lines).items():
        yield _value_table(notebook, lines)
    if found.claims:
        yield _pair_table("Claims with another verdict", found.claims)
    for group, pairs in found.changes.items():
        yield _pair_table(f"Changed: {group.lower()}", pairs)
    counted = ", ".join(f"{found.counts[verdict]} {verdict}" for verdict in VERDICTS if found.counts[verdict])
    outcome = Text(found.outcome.capitalize(), style="bold red" if found.differing else "bold green")
    yield Text.assemble(outcome, f". {len(found.lines)} values: {counted or 'none recorded'}.")


def _warnings(manifests: Sequence[Mapping[str, Any]], statuses: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader has to know before reading any value."""
    profiles = [manifest["profile"] for manifest in manifests]
    if profiles[0] != profiles[1]:
        yield (
            f"the profiles are not the same, {profiles[0]} and {profiles[1]}: their models and machines are others, "
            "and values that differ say nothing of a change in the workbook"
        )
    if all("rehearsal" in manifest for manifest in manifests):
        yield "both runs are rehearsals, with models of random weights: their values say nothing of the real models"
    for letter, status in zip("AB", statuses, strict=True):
        if status["state"] != "finished":
            yield f"{letter} did not finish: it is {status['state']}"
    for letter, own, other in zip("AB", statuses, reversed(statuses), strict=True):
        if alone := [name for name in own["notebooks"] if name not in other["notebooks"]]:
            yield f"only {letter} is made of {', '.join(alone)}: left out of the comparison"
    commits = [manifest["git"] for manifest in manifests]
    if commits[0]["commit"] == commits[1]["commit"] and any(commit["dirty"] for commit in commits):
        yield "the commit is the same, with uncommitted changes: the code may still differ"


def _facts(manifest: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, str]:
    git, hardware = manifest["git"], manifest["hardware"]
    commit = git["commit"][:12] if git["commit"] else "not a git checkout"
    facts = {
        "Profile": manifest["profile"],
        "Started": manifest["started"],
        "State": status["state"],
        "Commit": f"{commit}, with changes" if git["dirty"] else commit,
        "Python": manifest["python"],
        "Machine": machine(hardware),
    }
    if "error" in hardware:
        return facts
    return facts | {
        "Processor": f"{hardware['cpu_name']}, {hardware['cpu_count']} cores",
        "Memory": gib(hardware["ram_bytes"]),
        "System": hardware["system"],
    }


def _of_notebooks(status: Mapping[str, Any], shown: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    return {name: shown(entry) for name, entry in status["notebooks"].items()}


def _verdicts(run: Path) -> dict[str, str]:
    return {f"{claim['number']}: {claim['statement']}": claim["verdict"] for claim in ledger(run)}


def _pairs(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Pair, ...]:
    """What both name, in A's order, then what B alone names."""
    return tuple(Pair(what, first.get(what, NONE), second.get(what, NONE)) for what in {**first, **second})


def _unlike(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    return tuple(pair for pair in pairs if pair.differs)


def _lines(
    runs: Sequence[Path], manifests: Sequence[Mapping[str, Any]], shared: Sequence[str], strict_times: bool
) -> Iterator[Line]:
    values_a, values_b = (results.read(run)["values"] for run in runs)
    expected = [_expected(manifest["profile"]) for manifest in manifests]
    for notebook in shared:
        first, second = values_a.get(notebook, {}), values_b.get(notebook, {})
        for name in {**first, **second}:
            known = [values.get(f"{notebook}/{name}", {}) for values in expected]
            yield _line(notebook, name, (first.get(name), second.get(name)), known, strict_times)


def _expected(profile: str) -> dict[str, Any]:
    path = NOTEBOOKS / "expected" / f"{profile}.json"
    return results.read_json(path) if path.exists() else {}


def _line(
    notebook: str,
    name: str,
    entries: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    known: Sequence[Mapping[str, Any]],
    strict_times: bool,
) -> Line:
    recorded = [entry for entry in entries if entry is not None]
    unit = recorded[-1]["unit"]
    first, second = (None if entry is None else entry["value"] for entry in entries)
    timing = all(results.is_timing(entry["unit"]) for entry in recorded)
    noise = None if timing else _noise([entry["value"] for entry in recorded], recorded, known)
    if entries[0] is None or entries[1] is None:
        verdict = ONLY_B if entries[0] is None else ONLY_A
    elif entries[0]["unit"] != entries[1]["unit"]:
        verdict = BEYOND
    elif results.matches(second, first, 0):
        verdict = SAME
    elif timing and results.is_number(first) and results.is_number(second):
        verdict = NOISE if _within_factor(first, second) else SLOW
    else:
        verdict = WITHIN if results.matches(second, first, noise or 0) else BEYOND
    counts = verdict not in (SAME, WITHIN, NOISE) and (strict_times or not timing)
    return Line(notebook, name, unit, first, second, noise, verdict, counts, tuple(_notes(*entries)))


def _noise(
    values: Sequence[Value], recorded: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]
) -> float | None:
    """How far apart the values may lie; None where one of them is no number."""
    if not all(results.is_number(value) for value in values):
        return None
    own = [entry.get(key) for entry in recorded for key in ("tolerance", "floor")]
    of_profile = [entry.get("tolerance") for entry in known]
    for tolerances in (own, of_profile):
        if given := [tolerance for tolerance in tolerances if tolerance is not None]:
            return max(given)
    exact = all(isinstance(value, int) for value in values)
    return 0 if exact else results.FLOAT_FLOOR * max(abs(value) for value in values)


def _within_factor(first: float, second: float) -> bool:
    low, high = sorted((first, second))
    return low > 0 and high <= MACHINE_FACTOR * low


def _notes(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> Iterator[str]:
    if first is None or second is None:
        return
    if first["unit"] != second["unit"]:
        yield f"unit: {first['unit'] or 'none'} → {second['unit'] or 'none'}"
    if first.get("model") != second.get("model"):
        yield f"model: {first.get('model') or 'none'} → {second.get('model') or 'none'}"
    judgements = [{True: "yes", False: "no"}.get(entry.get("agrees"), "not judged") for entry in (first, second)]
    if judgements[0] != judgements[1]:
        yield f"agrees with {second['claim'] or first['claim']}: {judgements[0]} → {judgements[1]}"


def _changes(
    manifests: Sequence[Mapping[str, Any]], statuses: Sequence[Mapping[str, Any]], shared: Sequence[str]
) -> dict[str, tuple[Pair, ...]]:
    """What is not the same, by group; groups in which all is the same are left out."""
    groups = {
        "Parameters": _pairs(*(_parameters(manifest, shared) for manifest in manifests)),
        "Notebooks": tuple(_source(name, manifests, statuses) for name in shared),
        "Models": _models(manifests[0]["models"], manifests[1]["models"]),
        "Packages": _pairs(*(manifest["packages"] for manifest in manifests)),
    }
    return {group: unlike for group, pairs in groups.items() if (unlike := _unlike(pairs))}


def _parameters(manifest: Mapping[str, Any], notebooks: Iterable[str]) -> dict[str, str]:
    return {
        f"{notebook}: {name}": str(value)
        for notebook in notebooks
        for name, value in manifest["notebooks"][notebook]["parameters"].items()
    }


def _source(name: str, manifests: Sequence[Mapping[str, Any]], statuses: Sequence[Mapping[str, Any]]) -> Pair:
    """A notebook's file; ``inputs`` are a hash of its cells (not of the outputs in it), parameters and models."""
    hashes = [manifest["notebooks"][name]["sha256"][:12] for manifest in manifests]
    inputs = [status["notebooks"][name]["inputs"] for status in statuses]
    return Pair(
        f"{name}.ipynb (same cells, other saved outputs)" if inputs[0] == inputs[1] else f"{name}.ipynb", *hashes
    )


def _models(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Another model by role; where it is the same one, another revision, commit or file."""
    pairs = []
    for role in {**first, **second}:
        refs = [models.get(role) for models in (first, second)]
        labels = [ref["label"] if ref else NONE for ref in refs]
        pairs.append(Pair(ROLES.get(role, role), *labels))
        if labels[0] == labels[1]:
            pairs += _pairs(*(_versions(ref) for ref in refs))
    return tuple(dict.fromkeys(pairs))  # two roles may have the same model


def _versions(ref: Mapping[str, Any]) -> dict[str, str]:
    files = {f"{ref['label']}: {name}": digest[:12] for name, digest in ref["sha256"].items()}
    named = {f"{ref['label']}: {key}": ref.get(key) or NONE for key in ("revision", "commit")}
    return named | files


def _by_notebook(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines of each notebook, those that count first."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.notebook, []).append(line)
    return {notebook: sorted(of_it, key=lambda line: not line.counts) for notebook, of_it in found.items()}


def _table(title: str, first: str, *others: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"\n{title}", style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column(first, overflow="fold", ratio=3)
    for name in others:
        table.add_column(name, overflow="fold", ratio=2)
    return table


def _texts(pair: Pair) -> tuple[Text, Text]:
    from rich.text import Text

    return Text(pair.first), Text(pair.second, style="yellow" if pair.differs else "")


def _pair_table(title: str, pairs: Iterable[Pair]) -> Table:
    from rich.text import Text

    table = _table(title, "", "A", "B")
    for pair in pairs:
        table.add_row(Text(pair.what), Text(pair.first), Text(pair.second))
    return table


def _value_table(notebook: str, lines: Iterable[Line]) -> Table:
    from rich.text import Text

    table = _table(notebook, "value", "A", "B")
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column("", ratio=2)
    for line in lines:
        name = Text(line.name)
        name.append(f" ({line.unit})" if line.unit else "", style="dim")
        for note in line.notes:
            name.append(f"\n{note}", style="yellow")
        values = (Text(results.format_value(value)) for value in (line.first, line.second))
        style = "bold red" if line.counts else {SAME: "dim", NOISE: "dim", WITHIN: "green"}.get(line.verdict, "yellow")
        table.add_row(name, *values, line.change, Text(_verdict(line), style=style))
    return table


def _verdict(line: Line) -> str:
    """The verdict, with the noise that it was judged by where the values differ."""
    if line.verdict in (WITHIN, BEYOND) and line.noise:
        return f"{line.verdict} ± {line.noise:,.3g}"
    return line.verdict


def _context(found: Difference) -> dict[str, Any]:
    """What the page shows."""
    counts, name_a, name_b = found.counts, *found.names
    only = counts[ONLY_A] + counts[ONLY_B]
    counted = {line.verdict for line in found.lines if line.counts}
    tiles = (
        ("values in either run", len(found.lines), ""),
        ("the same", counts[SAME], ""),
        ("within tolerance", counts[WITHIN], ""),
        ("beyond tolerance", counts[BEYOND], "failed" if counts[BEYOND] else ""),
        ("only in one run", only, "failed" if counted & {ONLY_A, ONLY_B} else ""),
        ("times within noise", counts[NOISE], ""),
        ("times beyond noise", counts[SLOW], "failed" if SLOW in counted else ""),
    )
    return {
        "name_a": name_a,
        "name_b": name_b,
        "found": found,
        "tiles": [{"label": label, "value": value, "mark": mark} for label, value, mark in tiles],
        "notebooks": list(zip(found.statuses, found.times, strict=True)),
        "values": {notebook: [_shown(line) for line in lines] for notebook, lines in _by_notebook(found.lines).items()},
    }


def _shown(line: Line) -> dict[str, Any]:
    mark = (
        "differs" if line.counts else {SAME: "same", WITHIN: "as-expected", SLOW: "on-stand-in"}.get(line.verdict, "")
    )
    return {
        "name": line.name.replace("_", " "),
        "key": line.name,
        "notes": line.notes,
        "first": results.with_unit(line.first, line.unit),
        "second": results.with_unit(line.second, line.unit),
        "change": line.change,
        "noise": f"± {line.noise:,.3g}" if line.noise and line.verdict in (WITHIN, BEYOND) else "",
        "verdict": line.verdict,
        "mark": mark,
    }
