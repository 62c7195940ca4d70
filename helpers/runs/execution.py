"""``workbook run``: every notebook in turn, past failures, with status, manifest and resume."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.hashes import share_hashes
from helpers.base.terminal import Terminal, tell
from helpers.base.text import one_line, shell_word, shortened
from helpers.base.units import PRECISIONS
from helpers.models.checkpoint import LoadError
from helpers.models.finding import check_files
from helpers.models.loaded import forget_loads, read_loads
from helpers.runs import store
from helpers.runs.child import _Job
from helpers.runs.display import _display
from helpers.runs.document import UsageError
from helpers.runs.fetching import fetch
from helpers.runs.folder import _executed_notebook, _held, _keep_glossary, _outline, _utc_now
from helpers.runs.holding import _interrupted
from helpers.runs.interrupts import _Stop, interruptible
from helpers.runs.notebook import _roles_to_fetch, _undeclared
from helpers.runs.origins import _last_origin
from helpers.runs.parameters import _parse_parameters
from helpers.runs.recording import _forget
from helpers.runs.redaction import _redact
from helpers.runs.request import Request, _check_combination, _check_machine, _chosen_profile, _plans, _resumed, _target
from helpers.runs.resuming import _first_status, _of_another_origin, _pending
from helpers.runs.schema import _NotebookStatus, _RehearsalFacts
from helpers.runs.secrecy import _find_secrets
from helpers.runs.store import _read_results, _write_status
from helpers.runs.supervision import _environment, _kept_out, _supervise
from helpers.runs.sweeping import _sweep
from helpers.runs.upkeep import _Upkeep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from helpers.models.references import Profile
    from helpers.planning.rehearsal import Rehearsal
    from helpers.runs.display import Show
    from helpers.runs.notebook import _Plan
    from helpers.runs.schema import _Manifest
    from helpers.runs.supervision import _Progress
    from helpers.runs.sweeping import Seen

NOTEBOOKS = ROOT / "notebooks"
_LONGEST_REASON, _LONGEST_LINE = 2000, 200  # characters


class RunError(WorkbookError):
    """The run itself could not go on, for example because the disk is full, or a model cannot be downloaded."""

    exit_code = 1


class _InterruptedRunError(RunError):
    """A run that was interrupted before it had a folder: there is nothing to resume."""

    exit_code = 130


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, and the notebooks asked for that passed and that failed (with the reason).

    ``kept`` are those that passed earlier, under other code, packages, models or on another machine.
    """

    folder: Path
    passed: tuple[str, ...]
    failed: dict[str, str]
    interrupted: bool = False
    kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when every notebook asked for has passed."""
        return not self.failed and not self.interrupted


def run(request: Request, *, command: Sequence[str] = (), console: Console | None = None) -> RunResult:
    """Run the notebooks and return how each ended; a failure does not stop the others.

    ``command`` is kept in the manifest.

    The models that the notebooks declare are fetched first, outside of all budgets; each is used at the commit that it
    had then, in what is resumed too. A notebook that loads a model that it does not declare fails.

    Raises UsageError before anything runs, RunFolderError if the folder cannot be used, RunError on a full disk or
    if a model cannot be downloaded, RehearsalError if a model would not fit on the profile's machine.
    """
    result = None
    try:
        with interruptible() as stop:
            shown = console or Terminal()
            raw, asked, profile, plans = _planned(request, shown)
            target = _target(asked, profile)
            secrets = _secrets(raw, profile, plans, target)
            with _held(target):
                rehearsal = _prepared(profile, target / "rehearsal", shown) if asked.rehearse else None
                session = _Session(target, profile, plans, secrets, rehearsal)
                session.redo = asked.redo
                result = session.run(shown, raw, command, stop)
    except KeyboardInterrupt as error:
        if result is None:
            raise _InterruptedRunError(
                "Interrupted before the run began: nothing was run, and nothing is lost. Start it again with the same "
                "command."
            ) from error
    return result


def _planned(request: Request, console: Console) -> tuple[dict[str, str], Request, Profile, list[_Plan]]:
    """The parameters, the request with what a resumed run adds, the profile and the plans."""
    _check_combination(request)
    raw = _parse_parameters(request.parameters)
    earlier: dict[str, str] = {}
    if request.resume is not None:
        manifest = store.read_manifest(request.resume)
        request = _resumed(manifest, request, raw)
        earlier = manifest.parameters
    profile = _chosen_profile(request)
    plans, remarks = _plans(profile, request, NOTEBOOKS, raw, earlier)
    if not request.rehearse:
        _check_machine(profile)
    for remark in remarks:
        tell(console, one_line(remark))
    return earlier | raw, request, profile, plans


class _Session:
    """One run in its folder, which this process holds.

    ``redo``: what passed under other code, packages or models, or on another machine, runs again.
    """

    def __init__(
        self,
        folder: Path,
        profile: Profile,
        plans: Sequence[_Plan],
        secrets: tuple[str, ...],
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.folder, self.profile, self.plans, self.secrets = folder, profile, plans, secrets
        self.rehearsal = rehearsal
        self.swept: Seen = {}
        self.redo = False
        self.upkeep = _Upkeep(folder, profile, self._redact)
        self.status = _first_status(folder, plans)
        self.kept: tuple[str, ...] = ()
        self.stop = _Stop()

    def run(self, console: Console, raw: Mapping[str, str], command: Sequence[str], stop: _Stop) -> RunResult:
        """Run what is pending, and leave the folder complete, however it ends."""
        self.stop = stop
        try:
            interrupted = self._attempt(console, raw, command)
        except (OSError, LoadError) as error:
            told = str(error).rstrip(".")
            then = f"Then resume with: workbook run --resume {shell_word(self.folder)}"
            if not (self.folder / "manifest.json").exists():
                then = "Nothing was run. Then start the run again, in another folder."
            raise RunError(f"The run stopped: {told}. {then}") from error
        return self._result(interrupted)

    def _attempt(self, console: Console, raw: Mapping[str, str], command: Sequence[str]) -> bool:
        """Describe the run, run what is pending, and finish the status in any case; True if it was interrupted."""
        interrupted = False
        try:
            self._describe(raw, command)
            self._run_pending(console)
        except KeyboardInterrupt:
            interrupted = True
        except BaseException:
            with suppress(OSError):
                self._finish(interrupted=True)
            raise
        try:
            self._finish(interrupted)
        except KeyboardInterrupt:  # only the first signal raises it
            self._finish(interrupted)
        return interrupted

    def _describe(self, raw: Mapping[str, str], command: Sequence[str]) -> None:
        """Write the manifest and the status. What takes seconds comes last: a run that ends then can be resumed."""
        outline = _outline(self.profile, self.plans, raw, command)
        outline.clean_start = _kept_out(os.environ)
        if self.rehearsal:
            outline.rehearsal = _RehearsalFacts.model_validate(self.rehearsal.described())
        self.upkeep.begin(outline)
        self._save_status()
        manifest = self.upkeep.observe(outline)
        share_hashes(self.folder)  # the notebooks load the models that the manifest has just hashed
        self._judge_kept(manifest)
        self.upkeep.save()
        self._save_status()

    def _judge_kept(self, manifest: _Manifest) -> None:
        """What passed under another origin is kept and named, or runs again if that was asked for."""
        now = _last_origin(manifest, self.upkeep.code)
        plans = _of_another_origin(manifest, self.status, self.plans, now)
        if self.redo:
            self.status.notebooks |= {plan.name: _pending(plan) for plan in plans}
        else:
            self.kept = tuple(plan.name for plan in plans)

    def _run_pending(self, console: Console) -> None:
        self._fetch()
        with _display(console) as show:
            for plan in self.plans:
                self.stop.check()
                show(self.status)
                if self.status.notebooks[plan.name].status == "pending":
                    self._run_notebook(plan, show)
            show(self.status)

    def _fetch(self) -> None:
        """Check and fetch the models that the pending notebooks declare, while no budget runs; note their commits."""
        pending = [plan for plan in self.plans if self.status.notebooks[plan.name].status == "pending"]
        roles = _roles_to_fetch(model for plan in pending for model in plan.models or ())
        if self.rehearsal or not roles:
            return
        check_files(self.profile, roles)
        if not self.profile.offline:
            self.upkeep.note_commits(fetch(self.profile, roles, self.upkeep.commits))

    def _run_notebook(self, plan: _Plan, show: Show) -> None:
        entry = _pending(plan).model_copy(update={"status": "running", "started": _utc_now()})
        self.status.notebooks[plan.name] = entry
        self._save_status()
        # In this order: values never stand under an origin that they are not of.
        _forget(self.folder, plan.name)
        forget_loads(self.folder, plan.name)
        _executed_notebook(self.folder, plan.name).unlink(missing_ok=True)
        _keep_glossary(self.folder, plan.path)
        self.upkeep.note_start(plan)
        try:
            log = self.folder / "logs" / f"{plan.name}.log"
            progress = _supervise(self._job(plan), self._environment(plan), log, partial(self._follow, entry, show))
            self._judge(plan, entry, progress)
        except BaseException:
            entry.status, entry.reason = "failed", _interrupted(entry)
            raise
        finally:
            _sweep(self.folder, self.secrets, self.swept)
            self._save_status()

    def _judge(self, plan: _Plan, entry: _NotebookStatus, progress: _Progress) -> None:
        """Take in how a notebook ended, and what it left in the run's files."""
        try:
            if plan.models is not None:
                progress.reason = progress.reason or _undeclared(read_loads(self.folder, plan.name), plan.models)
            entry.recorded = len(_read_results(self.folder).values.get(plan.name, {}))
        except WorkbookError as error:
            progress.reason = progress.reason or str(error)
        self._take(entry, progress)
        entry.status = "failed" if progress.reason else "passed"

    def _follow(self, entry: _NotebookStatus, show: Show, progress: _Progress) -> None:
        self.stop.check()
        moved = progress.cell != entry.cell
        self._take(entry, progress)
        # This is called four times a second; the file changes with each cell.
        if moved:
            self._save_status()
        show(self.status)

    def _take(self, entry: _NotebookStatus, progress: _Progress) -> None:
        # Blanked here too, because the terminal shows these texts before any file does.
        # And cut only then, because the rest of a token that was cut through is not known as one.
        entry.reason = progress.reason and shortened(_redact(progress.reason, self.secrets), _LONGEST_REASON)
        entry.line = shortened(_redact(progress.line, self.secrets), _LONGEST_LINE)
        entry.cell, entry.cells = progress.cell, progress.cells
        entry.seconds = round(progress.seconds, 2)
        entry.peak_bytes = progress.peak_bytes
        self.status.peak_bytes = max(self.status.peak_bytes, progress.tree_bytes)

    def _job(self, plan: _Plan) -> _Job:
        return _Job(
            notebook=str(plan.path.absolute()),
            output=str(_executed_notebook(self.folder, plan.name)),
            parameters=plan.given,
            seconds=plan.budget.seconds,
            cell_seconds=plan.budget.cell_seconds,
            secrets=self.secrets,
        )

    def _environment(self, plan: _Plan) -> dict[str, str]:
        workbook = {
            "RUN_DIR": str(self.folder),
            "NOTEBOOK": plan.name,
            "PROFILE": self.profile.name,
            "EXPECTED": str(plan.path.absolute().parent / "expected" / f"{self.profile.name}.json"),
        }
        if self.rehearsal:  # nobody knows what tiny random models should give
            workbook["EXPECTED"] = str(self.rehearsal.folder / "no_expected_values.json")
            return _environment(os.environ, True, workbook) | self.rehearsal.environment()
        if self.upkeep.commits:
            workbook["REVISIONS"] = json.dumps(self.upkeep.commits)
        return _environment(os.environ, self.profile.offline, workbook)

    def _finish(self, interrupted: bool) -> None:
        self.status.state = "interrupted" if interrupted else "finished"
        self._save_status()
        self.upkeep.finish(self.status.notebooks, rehearsed=self.rehearsal is not None)
        _sweep(self.folder, self.secrets, self.swept)

    def _save_status(self) -> None:
        _write_status(self.folder, self.status, self._redact)

    def _redact(self, content: object) -> object:
        return _redact(content, self.secrets)

    def _result(self, interrupted: bool) -> RunResult:
        passed, failed = [], {}
        for plan in self.plans:
            entry = self.status.notebooks[plan.name]
            if entry.status == "passed":
                passed.append(plan.name)
            else:
                failed[plan.name] = entry.reason or "not run"
        return RunResult(self.folder, tuple(passed), failed, interrupted, self.kept)


def _secrets(raw: Mapping[str, str], profile: Profile, plans: Sequence[_Plan], folder: Path) -> tuple[str, ...]:
    """What must stand in no file of the run. Raises UsageError if the folder's own name holds a secret."""
    public = [profile.name, *PRECISIONS, *(model.id for model in profile.models.values())]
    for plan in plans:
        public += [plan.name, *plan.effective]
    secrets = _find_secrets({**os.environ, **raw}, public)
    if _redact(folder.name, secrets) != folder.name:
        raise UsageError("The name of the run folder holds a token or a password. Name another folder with --folder.")
    return secrets


def _prepared(profile: Profile, folder: Path, console: Console) -> Rehearsal:
    from helpers.planning.rehearsal import prepare

    with console.status("Planning at the true size, and making the small checkpoints"):
        return prepare(profile, folder)
