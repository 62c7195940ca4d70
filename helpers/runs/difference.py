"""Two runs compared: their values, and what else was not the same.

``difference_values`` says which values differ by more than their noise. A value that only one run recorded, of a
notebook that both ran, is a difference, and so is another status of such a notebook. Versions, parameters, sources,
models and machines explain differences, and are none themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import duration
from helpers.runs import store
from helpers.runs.claims import _ledger
from helpers.runs.difference_values import _Line, _lines, _Run
from helpers.runs.execution import NOTEBOOKS
from helpers.runs.expected import _lost
from helpers.runs.holding import _status_now
from helpers.runs.origins import _code_text, _commit, _machine, _machine_facts, _origin, _source_notes, _value_origins
from helpers.runs.pages import ROLES
from helpers.runs.store import _read_results

if TYPE_CHECKING:
    from helpers.runs.schema import _Manifest, _ModelFacts, _Origin

_NONE = "–"


class DifferenceError(WorkbookError):
    """Two runs that cannot be compared, or a page that cannot be written."""


@dataclass(frozen=True)
class _Pair:
    """One fact of both runs, as text; a dash where a run has none."""

    what: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """True if the runs are unlike in this."""
        return self.first != self.second


@dataclass(frozen=True)
class _RunDifference:
    """Two runs compared; A is the one to compare with.

    ``facts`` say what ran and where; ``statuses`` and ``times`` hold a pair for each notebook of either run;
    ``changes`` are other parameters, notebooks, models and packages, by group; ``claims`` those with another verdict.
    """

    run_a: Path
    run_b: Path
    warnings: tuple[str, ...]
    facts: tuple[_Pair, ...]
    statuses: tuple[_Pair, ...]
    times: tuple[_Pair, ...]
    lines: tuple[_Line, ...]
    changes: Mapping[str, tuple[_Pair, ...]]
    claims: tuple[_Pair, ...]

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
        number = 0
        for line in self.lines:
            if line.counts:
                number += 1
        for pair in self.statuses:
            # A notebook that only one run is made of has a dash for the other, and was left out of the comparison.
            if pair.differs and _NONE not in (pair.first, pair.second):
                number += 1
        return number

    @property
    def outcome(self) -> str:
        """The outcome in a few words."""
        number = self.differing
        return f"{number or 'no'} difference{'s' if number > 1 else ''} beyond tolerance"


def compare_runs(run_a: Path, run_b: Path, *, strict_times: bool = False) -> _RunDifference:
    """Compare two run folders; with ``strict_times``, times beyond the machine's noise are differences too.

    Raises RunFolderError for a folder without a run, ResultError for damaged files, and DifferenceError for a rehearsal
    and a real run, and for runs that share no notebook.
    """
    first, second = _read(run_a), _read(run_b)
    shared = _shared_notebooks(first, second)
    return _RunDifference(
        run_a,
        run_b,
        warnings=tuple(_warnings(first, second)),
        facts=_pairs(_facts(first), _facts(second)),
        statuses=_pairs(_states(first), _states(second)),
        times=_pairs(_times(first), _times(second)),
        lines=tuple(_lines(first, second, shared, strict_times)),
        changes=_changes(first, second, shared),
        claims=_unlike(_pairs(_claim_verdicts(first), _claim_verdicts(second))),
    )


def _read(folder: Path) -> _Run:
    manifest, status = store.read_manifest(folder), _status_now(folder)
    expected = store.read_expected(NOTEBOOKS / "expected" / f"{manifest.profile}.json")
    return _Run(folder, manifest, status, _read_results(folder).values, expected)


def _shared_notebooks(first: _Run, second: _Run) -> list[str]:
    """The notebooks that both runs are made of. Raises DifferenceError for runs that cannot be compared."""
    if first.rehearsed != second.rehearsed:
        rehearsal = first if first.rehearsed else second
        raise DifferenceError(
            f"{rehearsal.folder} is a rehearsal and the other run is not. "
            "A rehearsal can only be compared with another rehearsal."
        )
    shared = [name for name in first.status.notebooks if name in second.status.notebooks]
    if not shared:
        names_a, names_b = ", ".join(first.status.notebooks), ", ".join(second.status.notebooks)
        raise DifferenceError(f"The runs share no notebook: A has {names_a}; B has {names_b}.")
    return shared


def _warnings(first: _Run, second: _Run) -> Iterator[str]:
    """What a reader has to know before reading any value."""
    profiles = first.manifest.profile, second.manifest.profile
    if profiles[0] != profiles[1]:
        yield (
            f"the profiles are not the same, {profiles[0]} and {profiles[1]}: their models and machines are others, "
            "and values that differ say nothing of a change in the workbook"
        )
    if first.rehearsed and second.rehearsed:
        yield "both runs are rehearsals, with models of random weights: their values say nothing of the real models"
    yield from _unfinished("A", first)
    yield from _unfinished("B", second)
    yield from _alone("A", first, second)
    yield from _alone("B", second, first)
    yield from _changed_in_place(first, second)


def _changed_in_place(first: _Run, second: _Run) -> Iterator[str]:
    """Say it if the code may differ, although the commit is the same."""
    git_a, git_b = first.manifest.git, second.manifest.git
    if git_a.commit != git_b.commit or not (git_a.dirty or git_b.dirty):
        return
    known = [(a.code, b.code) for a, b in _origins_of(first, second, _shared_notebooks(first, second))]
    if any(code_a is None or code_b is None for code_a, code_b in known):
        yield "the commit is the same, with uncommitted changes: the code may still differ"
    elif any(code_a != code_b for code_a, code_b in known):
        yield "the commit is the same, with uncommitted changes: the code differs"


def _unfinished(letter: str, run: _Run) -> Iterator[str]:
    if run.status.state != "finished":
        yield f"{letter} did not finish: it is {run.status.state_text}"
    for note in (*_lost(run.status, _read_results(run.folder)), *_source_notes(run.manifest)):
        yield f"{letter}: {note}"


def _alone(letter: str, own: _Run, other: _Run) -> Iterator[str]:
    names = [name for name in own.status.notebooks if name not in other.status.notebooks]
    if names:
        yield f"only {letter} is made of {', '.join(names)}: left out of the comparison"


def _facts(run: _Run) -> dict[str, str]:
    manifest = run.manifest
    return {
        "Profile": manifest.profile,
        "Started": manifest.started,
        "State": run.status.state_text,
        "Commit": _of_all(run, "Commit", _commit(manifest.git)),
        "Python": _of_all(run, "Python", manifest.python),
        "Machine": _machine(manifest.hardware),
        **_machine_facts(manifest.hardware),
    }


def _of_all(run: _Run, what: str, last: str) -> str:
    """A fact of a run; if its values are of several origins, what each of them has."""
    texts = dict.fromkeys(source.facts.get(what, last) for source in _value_origins(run.manifest))
    return " and ".join(texts) or last


def _states(run: _Run) -> dict[str, str]:
    return {name: entry.status for name, entry in run.status.notebooks.items()}


def _times(run: _Run) -> dict[str, str]:
    return {name: duration(entry.seconds) for name, entry in run.status.notebooks.items()}


def _claim_verdicts(run: _Run) -> dict[str, str]:
    return {f"{entry.number}: {entry.claim.statement}": entry.text for entry in _ledger(run.folder)}


def _changes(first: _Run, second: _Run, shared: Sequence[str]) -> dict[str, tuple[_Pair, ...]]:
    """What is not the same, by group, of the groups in which something is not."""
    manifest_a, manifest_b = first.manifest, second.manifest
    groups = {
        "Parameters": _pairs(_parameters(manifest_a, shared), _parameters(manifest_b, shared)),
        "Notebooks": tuple(_source(name, first, second) for name in shared),
        "Models": _models(manifest_a.models, manifest_b.models),
        "Packages": _packages(first, second, shared),
        "Code": _code(first, second, shared),
    }
    changes = {}
    for group, pairs in groups.items():
        if unlike := _unlike(pairs):
            changes[group] = unlike
    return changes


def _parameters(manifest: _Manifest, notebooks: Iterable[str]) -> dict[str, str]:
    parameters = {}
    for notebook in notebooks:
        facts = manifest.notebooks.get(notebook)
        for name, value in (facts.parameters if facts else {}).items():
            parameters[f"{notebook}: {name}"] = str(value)
    return parameters


def _origins_of(first: _Run, second: _Run, shared: Iterable[str]) -> list[tuple[_Origin, _Origin]]:
    """Where the values of each notebook come from in both runs; a notebook that did not start has no origin."""
    origins = []
    for notebook in shared:
        origin_a, origin_b = _origin(first.manifest, notebook), _origin(second.manifest, notebook)
        if origin_a is not None and origin_b is not None:
            origins.append((origin_a, origin_b))
    return origins


def _packages(first: _Run, second: _Run, shared: Iterable[str]) -> tuple[_Pair, ...]:
    """The packages that the values of both runs come from, and not those of the last start alone."""
    pairs: dict[_Pair, None] = {}
    for origin_a, origin_b in _origins_of(first, second, shared):
        pairs |= dict.fromkeys(_pairs(origin_a.packages, origin_b.packages))
    return tuple(pairs)


def _code(first: _Run, second: _Run, shared: Sequence[str]) -> tuple[_Pair, ...]:
    """Commit and code of each notebook, if a run has several: otherwise they are among the facts of the run."""
    if not (_value_origins(first.manifest) or _value_origins(second.manifest)):
        return ()
    pairs = []
    for notebook in shared:
        origins = _origin(first.manifest, notebook), _origin(second.manifest, notebook)
        pairs.append(_Pair(notebook, *(_NONE if origin is None else _code_text(origin) for origin in origins)))
    return tuple(pairs)


def _source(name: str, first: _Run, second: _Run) -> _Pair:
    """The files of a notebook in both runs."""
    # ``inputs`` is a hash of the cells, parameters and models; the file's own changes with the outputs saved in it.
    same_inputs = first.status.notebooks[name].inputs == second.status.notebooks[name].inputs
    facts_a, facts_b = first.manifest.notebooks.get(name), second.manifest.notebooks.get(name)
    hash_a, hash_b = (facts.sha256[:12] if facts else _NONE for facts in (facts_a, facts_b))
    remark = " (same cells, other saved outputs)" if same_inputs else ""
    return _Pair(f"{name}.ipynb{remark}", hash_a, hash_b)


def _models(first: Mapping[str, _ModelFacts], second: Mapping[str, _ModelFacts]) -> tuple[_Pair, ...]:
    """Another model by role; if it is the same one, another revision, commit or file."""
    pairs = []
    for role in {**first, **second}:
        ref_a, ref_b = first.get(role), second.get(role)
        label_a = ref_a.label if ref_a else _NONE
        label_b = ref_b.label if ref_b else _NONE
        pairs.append(_Pair(ROLES.get(role, role), label_a, label_b))
        if ref_a and ref_b and label_a == label_b:
            pairs += _pairs(_versions(ref_a), _versions(ref_b))
    # Two roles may have the same model, whose files are to be named once.
    return tuple(dict.fromkeys(pairs))


def _versions(ref: _ModelFacts) -> dict[str, str]:
    versions = {f"{ref.label}: revision": ref.revision or _NONE, f"{ref.label}: commit": ref.commit or _NONE}
    for name, digest in ref.sha256.items():
        versions[f"{ref.label}: {name}"] = digest[:12]
    return versions


def _pairs(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[_Pair, ...]:
    """What both name, in A's order, then what B alone names."""
    return tuple(_Pair(what, first.get(what, _NONE), second.get(what, _NONE)) for what in {**first, **second})


def _unlike(pairs: Iterable[_Pair]) -> tuple[_Pair, ...]:
    return tuple(pair for pair in pairs if pair.differs)
