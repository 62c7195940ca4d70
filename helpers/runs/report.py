"""A finished run as HTML pages, made from the files of its run folder alone: the report, and its notebooks' pages."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from helpers.base.files import write_text
from helpers.base.units import GIB, duration, gib
from helpers.runs import store
from helpers.runs.claims import _judged_claims, _stand_ins
from helpers.runs.expected import _lost, _with_tolerance, _with_unit
from helpers.runs.holding import _status_now
from helpers.runs.origins import _commit, _machine, _machine_facts, _source_notes, _value_origins
from helpers.runs.pages import ROLES, _render_page, _write_pages
from helpers.runs.schema import AS_EXPECTED, DIFFERS, UNMEASURED, _NotebookStatus, _RecordedValue
from helpers.runs.store import _read_results
from helpers.runs.value_lines import _shown_name
from helpers.runs.wording import TOO_CLOSE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from helpers.runs.claims import _JudgedClaim
    from helpers.runs.schema import _LoadedModel, _Manifest, _ModelFacts, _Results, _Status

_MAIN_PACKAGES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "peft", "trl", "safetensors", "tokenizers", "numpy"),
    *("papermill", "ipykernel", "ipywidgets", "jupyterlab", "matplotlib"),
)


@dataclass(frozen=True)
class _ValueRow:
    """A recorded value as the report shows it; ``answer`` is what it says to its claim, in words."""

    key: str
    content: _RecordedValue
    answer: str = ""

    @property
    def name(self) -> str:
        return _shown_name(self.key, self.content.model)

    @property
    def claim(self) -> str:
        return self.content.claim or ""

    @property
    def value(self) -> str:
        return _with_unit(self.content.value, self.content.unit)

    @property
    def expected(self) -> str:
        return _with_tolerance(self.content.expected, self.content.tolerance, self.content.unit)

    @property
    def source(self) -> str:
        return self.content.source or ""

    @property
    def verdict(self) -> str:
        return self.content.verdict

    @property
    def mark(self) -> str:
        return self.content.verdict.replace(" ", "-")

    @property
    def answer_mark(self) -> str:
        return self.answer.replace(" ", "-")

    @property
    def model(self) -> str | None:
        return self.content.model


@dataclass(frozen=True)
class _NotebookRow:
    """A notebook as the report shows it.

    ``page`` is the relative address of its own page, if it has one. ``origin`` is the number of the origin of its
    values; 0 if the whole run has one.
    """

    name: str
    entry: _NotebookStatus
    page: str
    values: tuple[_ValueRow, ...]
    origin: int = 0

    @property
    def status(self) -> str:
        return self.entry.status

    @property
    def reason(self) -> str | None:
        return self.entry.reason

    @property
    def line(self) -> str:
        return self.entry.line

    @property
    def progress(self) -> str:
        return f"{self.entry.cell} of {self.entry.cells}" if self.entry.cells else "–"

    @property
    def time(self) -> str:
        return duration(self.entry.seconds) if self.entry.started else "–"

    @property
    def expected(self) -> str:
        return duration(self.entry.expected_seconds)

    @property
    def budget(self) -> str:
        return duration(self.entry.budget_seconds)

    @property
    def share(self) -> int:
        """Percent of the budget."""
        # A notebook that was killed may have run over, and the bar must not; a blanked budget reads 0.
        return min(100, round(100 * self.entry.seconds / (self.entry.budget_seconds or 1)))

    @property
    def memory(self) -> str:
        return gib(self.entry.peak_bytes) if self.entry.peak_bytes else "–"

    @property
    def differing_first(self) -> list[_ValueRow]:
        return sorted(self.values, key=lambda value: value.verdict != DIFFERS)


@dataclass
class _ValueSource:
    """The values that one notebook recorded for a claim on one model."""

    notebook: _NotebookRow
    model: str | None
    values: list[_ValueRow] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and its notebooks' pages (``html/``) into a run folder and return the report's path.

    A notebook's page is written again only if the executed notebook is newer. A page or a figure that cannot be made is
    a line of the report. Raises RunFolderError if there is no run in the folder, ResultError for a damaged file, and
    FileError if the report cannot be written.
    """
    target = run_dir / "report.html"
    write_text(target, _render_page("report.html.j2", _content(run_dir)))
    return target


def _content(run_dir: Path) -> dict[str, object]:
    """What the page shows. Writes the notebooks' pages that are missing or old, to link to them."""
    status, manifest, recorded = _status_now(run_dir), store.read_manifest(run_dir), _read_results(run_dir)
    pages, problems = _write_pages(run_dir, status.notebooks)
    sources = _value_origins(manifest)
    numbers = {name: source.number for source in sources for name in source.notebooks}
    claims = _judged_claims(status, manifest, recorded)
    notebooks = _notebook_rows(status, recorded, pages, numbers, _answers(claims))
    figures = _figures(run_dir, recorded, notebooks, problems)
    return _setting(manifest) | {
        "name": run_dir.resolve().name,
        "outcome": _outcome(status),
        "tiles": _tiles(status, claims, _verdicts(notebooks)),
        "facts": _facts(manifest, mixed=bool(sources)),
        "notebooks": notebooks,
        "claims": [(claim, _sources(claim, notebooks), _earlier_counts(claim)) for claim in claims],
        "judged": Counter(claim.verdict.mark for claim in claims),
        "in_part": Counter(claim.confirmed_in_part for claim in claims)[True],
        "too_close": Counter(claim.verdict.text.startswith(TOO_CLOSE) for claim in claims)[True],
        "verdicts": _verdicts(notebooks),
        "figures": figures,
        "notes": [*_lost(status, recorded), *_source_notes(manifest)],
        "problems": problems,
        "sources": sources,
    }


def _setting(manifest: _Manifest) -> dict[str, object]:
    """What the page shows of the machine, the models and the software, which the manifest alone tells."""
    return {
        "manifest": manifest,
        "machine": _machine(manifest.hardware),
        "date": f"{datetime.fromisoformat(manifest.started):%-d %B %Y}",
        "labels": sorted({ref.label for ref in manifest.models.values()}),
        "stand_ins": _stand_ins(manifest),
        "rehearsal": _rehearsal(manifest),
        "models": [_model(role, ref) for role, ref in manifest.models.items()],
        "loaded": _loaded_rows(manifest.loaded),
        "packages": {name: manifest.packages[name] for name in _MAIN_PACKAGES if name in manifest.packages},
        "hashes": _hashes(manifest),
    }


def _answers(claims: Iterable[_JudgedClaim]) -> dict[tuple[str, str], str]:
    """What each value says to its claim, in words, by notebook and name."""
    return {(value.notebook, value.name): value.answer for claim in claims for value in claim.values}


def _notebook_rows(
    status: _Status,
    recorded: _Results,
    pages: Mapping[str, str],
    origins: Mapping[str, int],
    answers: Mapping[tuple[str, str], str],
) -> list[_NotebookRow]:
    rows = []
    for name, entry in status.notebooks.items():
        values = []
        for key, value in recorded.values.get(name, {}).items():
            values.append(_ValueRow(key, value, answers.get((name, key), "")))
        rows.append(_NotebookRow(name, entry, pages.get(name, ""), tuple(values), origins.get(name, 0)))
    return rows


def _outcome(status: _Status) -> dict[str, str]:
    total = len(status.notebooks)
    passed = _passed(status)
    if status.state != "finished":
        return {"mark": "failed", "text": f"{status.state_text}: {passed} of {total} notebooks passed"}
    if passed == total:
        return {"mark": "passed", "text": f"all {total} notebooks passed"}
    return {"mark": "failed", "text": f"{total - passed} of {total} notebooks did not pass"}


def _passed(status: _Status) -> int:
    return Counter(entry.status for entry in status.notebooks.values())["passed"]


def _verdicts(notebooks: Iterable[_NotebookRow]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for notebook in notebooks:
        counts.update(value.verdict for value in notebook.values)
    return counts


def _tiles(status: _Status, claims: Sequence[_JudgedClaim], verdicts: Mapping[str, int]) -> list[dict[str, str]]:
    """The summary: a few figures, each with the section that tells more and a mark."""
    entries = status.notebooks.values()
    passed = _passed(status)
    whole = passed == len(entries) and status.state == "finished"
    # The peak of the whole run is more than that of one notebook, but earlier runs did not record it.
    peak = status.peak_bytes or max((entry.peak_bytes for entry in entries), default=0)
    judged = Counter(claim.judged for claim in claims)[True]
    differing = verdicts.get(DIFFERS, 0)
    rows = (
        ("notebooks passed", f"{passed} of {len(entries)}", "notebooks", "passed" if whole else "failed"),
        ("values as expected", str(verdicts.get(AS_EXPECTED, 0)), "values", ""),
        ("values that differ", str(differing), "values", "failed" if differing else ""),
        ("values unmeasured", str(verdicts.get(UNMEASURED, 0)), "values", ""),
        ("claims with a verdict", f"{judged} of {len(claims)}", "claims", ""),
        ("total time", duration(sum(entry.seconds for entry in entries)), "notebooks", ""),
        ("peak memory", gib(peak) if peak else "–", "notebooks", ""),
    )
    return [{"label": label, "value": value, "to": to, "mark": mark} for label, value, to, mark in rows]


def _rehearsal(manifest: _Manifest) -> dict[str, object] | None:
    """What stood in for what, and the plans at the true size; None for a run that was no rehearsal."""
    if manifest.rehearsal is None:
        return None
    plans = []
    for plan in manifest.rehearsal.plans:
        devices = [f"{size / GIB:.1f}" for size in plan.device_bytes]
        plans.append(plan.model_dump() | {"devices": devices, "limit": gib(plan.limit_bytes)})
    return {"substitutions": manifest.rehearsal.substitutions, "plans": plans}


def _sources(claim: _JudgedClaim, notebooks: Iterable[_NotebookRow]) -> list[_ValueSource]:
    """Values in the order of recording, those of one notebook and model together."""
    rows = {notebook.name: notebook for notebook in notebooks}
    sources: dict[tuple[str, str | None], _ValueSource] = {}
    for value in claim.values:
        key = value.notebook, value.content.model
        source = sources.setdefault(key, _ValueSource(rows[value.notebook], value.content.model))
        source.values.append(_ValueRow(value.name, value.content, value.answer))
    return list(sources.values())


def _earlier_counts(claim: _JudgedClaim) -> list[tuple[str, str]]:
    """How many values of a claim are as in earlier runs, in words, each with its mark."""
    counts = Counter(value.content.verdict for value in claim.values)
    words = {AS_EXPECTED: "as expected", DIFFERS: "differ", UNMEASURED: "without an earlier run"}
    if counts[DIFFERS] == 1:
        words[DIFFERS] = "differs"
    return [
        (f"{counts[verdict]} {text}", verdict.replace(" ", "-")) for verdict, text in words.items() if counts[verdict]
    ]


def _model(role: str, ref: _ModelFacts) -> dict[str, str | None]:
    revisions = {"embedded": "in this repository", "package": ref.file}
    return {
        "role": ROLES.get(role, role),
        "name": ref.id,
        "stand_in_for": "itself, in a rehearsal" if ref.rehearsed else ref.stand_in_for or "",
        "revision": revisions.get(ref.source, ref.revision),
        "licence": ref.licence or "–",
    }


def _loaded_rows(loads: Iterable[_LoadedModel]) -> list[dict[str, str]]:
    """A row for each model, precision and commit that a notebook loaded, with the notebooks that loaded it."""
    notebooks: dict[tuple[str, str, str | None], dict[str, None]] = {}
    for load in loads:
        # A dict, because a notebook may load a model several times.
        notebooks.setdefault((load.label, load.precision, load.commit), {})[load.notebook] = None
    rows = []
    for (label, precision, commit), names in notebooks.items():
        shown = commit[:12] if commit else "–"
        rows.append({"label": label, "precision": precision, "commit": shown, "notebooks": ", ".join(names)})
    return rows


def _facts(manifest: _Manifest, mixed: bool) -> dict[str, str]:
    """What ran and where, by label; ``mixed``: values have several origins, and these facts are the last start's."""
    facts = {
        "Profile": f"{manifest.profile}: {manifest.description}",
        "Started": _moment(manifest.started),
        "Finished": _moment(manifest.finished),
        "Command": shlex.join(manifest.command) or "–",
    }
    if manifest.resumed:
        facts["Resumed"] = ", ".join(map(_moment, manifest.resumed))
    last = {"Commit": _commit(manifest.git), "Python": manifest.python, **_machine_facts(manifest.hardware)}
    facts |= {f"{label}, last start" if mixed else label: text for label, text in last.items()}
    if manifest.clean_start:
        facts["Environment of the kernels"] = "; ".join(manifest.clean_start)
    return facts


def _figures(
    run_dir: Path, recorded: _Results, notebooks: Iterable[_NotebookRow], problems: list[str]
) -> list[dict[str, object]]:
    """The figures in the order of the notebooks, each as a data URI with what its caption says.

    One whose file cannot be read is noted in ``problems``.
    """
    figures: list[dict[str, object]] = []
    for notebook in notebooks:
        for name, path in recorded.figures.get(notebook.name, {}).items():
            try:
                uri = _data_uri(run_dir / path)
            except OSError as error:
                problems.append(f"The figure {name} of {notebook.name} cannot be read: {path} ({error.strerror})")
                continue
            figures.append({"notebook": notebook, "name": name.replace("_", " "), "uri": uri})
    return figures


def _data_uri(path: Path) -> str:
    # Within the page, because a report is sent around without its folder.
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _hashes(manifest: _Manifest) -> dict[str, dict[str, str]]:
    """The SHA-256 of files by model, and of the notebooks; a hub's models have none."""
    hashes = {}
    for ref in manifest.models.values():
        if ref.sha256:
            hashes[ref.label] = ref.sha256
    for name, entry in manifest.notebooks.items():
        hashes.setdefault("Notebooks", {})[f"{name}.ipynb"] = entry.sha256
    return hashes


def _moment(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC" if text else "–"
