"""``workbook run``: every notebook in turn, past failures, with status, manifest and resume."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.hashes import share_hashes
from helpers.models.checkpoint import LoadError
from helpers.models.finding import check_files
from helpers.models.loaded import forget_loads, read_loads
from helpers.runs import store
from helpers.runs.child import _Job
from helpers.runs.display import _display
from helpers.runs.fetching import fetch
from helpers.runs.folder import (
    _build_manifest,
    _executed_notebook,
    _held,
    _hub_commit,
    _merge_manifests,
    _utc_now,
)
from helpers.runs.notebook import _loaded_models, _parse_parameters, _plan_run, _roles_to_fetch, _undeclared
from helpers.runs.recording import _forget
from helpers.runs.redaction import _find_secrets, _redact, _sweep
from helpers.runs.request import Request, _check_machine, _chosen_profile, _resumed, _target
from helpers.runs.schema import _NotebookStatus, _RehearsalFacts, _Status
from helpers.runs.store import _read_status, _write_manifest, _write_status
from helpers.runs.supervision import _environment, _supervise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from helpers.models.references import Profile
    from helpers.planning.rehearsal import Rehearsal
    from helpers.runs.display import Show
    from helpers.runs.notebook import _Plan
    from helpers.runs.schema import _Manifest
    from helpers.runs.supervision import _Progress

NOTEBOOKS = ROOT / "notebooks"


class RunError(WorkbookError):
    """The run itself could not go on, for example because the disk is full, or a model cannot be downloaded."""

    exit_code = 1


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, and the notebooks asked for that passed and that failed (with the reason)."""

    folder: Path
    passed: tuple[str, ...]
    failed: dict[str, str]
    interrupted: bool = False

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
    console = console or Console()
    raw = _parse_parameters(request.parameters)
    earlier: dict[str, str] = {}
    if request.resume is not None:
        manifest = store.read_manifest(request.resume)
        request = _resumed(manifest, request, raw)
        earlier = manifest.parameters
    profile = _chosen_profile(request)
    plans = _plan_run(profile, request.notebooks or NOTEBOOKS, request.only, raw, earlier)
    if not request.rehearse:
        _check_machine(profile)
    raw, target = earlier | raw, _target(request, profile)
    with _held(target):
        rehearsal = _prepared(profile, target / "rehearsal", console) if request.rehearse else None
        session = _Session(target, profile, plans, _find_secrets({**os.environ, **raw}), rehearsal)
        return session.run(console, raw, command)


class _Session:
    """One run in its folder, which this process holds."""

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
        self.resumed = (folder / "status.json").exists()
        self.status = self._first_status()
        self.manifest: _Manifest | None = None  # until _describe, which takes seconds to hash the models
        self.commits = store.read_manifest(folder).commits if self.resumed else {}

    def run(self, console: Console, raw: Mapping[str, str], command: Sequence[str]) -> RunResult:
        """Run what is pending, and leave the folder complete."""
        try:
            with _interruptible():
                self._describe(raw, command)
                interrupted = self._run_pending(console)
                self._finish(interrupted)
        except OSError as error:
            with suppress(OSError):
                self._finish(interrupted=True)
            raise RunError(
                f"The run stopped: {error}. Fix this, then resume with: workbook run --resume {self.folder}"
            ) from error
        except LoadError as error:
            self._finish(interrupted=True)
            raise RunError(f"{error} Then resume with: workbook run --resume {self.folder}") from error
        return self._result(interrupted)

    def _first_status(self) -> _Status:
        """The status at the start; of an earlier run in this folder, what still holds."""
        if not self.resumed:
            return _Status(state="running", notebooks={plan.name: _pending(plan) for plan in self.plans})
        earlier = _read_status(self.folder)
        entries = dict(earlier.notebooks)
        for plan in self.plans:
            entry = entries.get(plan.name)
            if entry is None or not self._still_holds(plan, entry):
                entries[plan.name] = _pending(plan)
        return _Status(state="running", peak_bytes=earlier.peak_bytes, notebooks=dict(sorted(entries.items())))

    def _still_holds(self, plan: _Plan, entry: _NotebookStatus) -> bool:
        executed = _executed_notebook(self.folder, plan.name).exists()
        return entry.status == "passed" and entry.inputs == plan.inputs and executed

    def _describe(self, raw: Mapping[str, str], command: Sequence[str]) -> None:
        manifest = _build_manifest(self.profile, self.plans, raw, command)
        if self.rehearsal:
            manifest.rehearsal = _RehearsalFacts.model_validate(self.rehearsal.described())
        if self.resumed:
            manifest = _merge_manifests(store.read_manifest(self.folder), manifest)
        self.manifest = manifest
        share_hashes(self.folder)  # the notebooks load the models that the manifest has just hashed
        self._save_manifest()
        self._save_status()

    def _run_pending(self, console: Console) -> bool:
        """Run the pending notebooks; True when a person or the system interrupted this."""
        try:
            self._fetch()
            with _display(console) as show:
                for plan in self.plans:
                    show(self.status)
                    if self.status.notebooks[plan.name].status == "pending":
                        self._run_notebook(plan, show)
                show(self.status)
        except KeyboardInterrupt:
            return True
        return False

    def _fetch(self) -> None:
        """Check and fetch the models that the pending notebooks declare, while no budget runs; note their commits."""
        pending = [plan for plan in self.plans if self.status.notebooks[plan.name].status == "pending"]
        roles = _roles_to_fetch(model for plan in pending for model in plan.models)
        if self.rehearsal or not roles:
            return
        check_files(self.profile, roles)
        if self.profile.offline:
            return
        self.commits |= fetch(self.profile, roles, self.commits)
        self._save_manifest()

    def _run_notebook(self, plan: _Plan, show: Show) -> None:
        entry = _pending(plan).model_copy(update={"status": "running", "started": _utc_now()})
        self.status.notebooks[plan.name] = entry
        self._save_status()
        _forget(self.folder, plan.name)
        forget_loads(self.folder, plan.name)
        _executed_notebook(self.folder, plan.name).unlink(missing_ok=True)
        try:
            log = self.folder / "logs" / f"{plan.name}.log"
            progress = _supervise(self._job(plan), self._environment(plan), log, partial(self._follow, entry, show))
            progress.reason = progress.reason or _undeclared(read_loads(self.folder, plan.name), plan.models)
            self._take(entry, progress)
            entry.status = "failed" if progress.reason else "passed"
        except BaseException:
            entry.status, entry.reason = "failed", f"interrupted at cell {entry.cell}"
            raise
        finally:
            _sweep(self.folder, self.secrets)
            self._save_status()

    def _follow(self, entry: _NotebookStatus, show: Show, progress: _Progress) -> None:
        moved = progress.cell != entry.cell
        self._take(entry, progress)
        # This is called four times a second; the file changes with each cell.
        if moved:
            self._save_status()
        show(self.status)

    def _take(self, entry: _NotebookStatus, progress: _Progress) -> None:
        # Blanked here too, because the terminal shows these texts before any file does.
        entry.reason = progress.reason and _redact(progress.reason, self.secrets)
        entry.line = _redact(progress.line, self.secrets)
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
            return _environment({**os.environ, **self.rehearsal.environment()}, True, workbook)
        if self.commits:
            workbook["REVISIONS"] = json.dumps(self.commits)
        return _environment(os.environ, self.profile.offline, workbook)

    def _finish(self, interrupted: bool) -> None:
        self.status.state = "interrupted" if interrupted else "finished"
        # A full disk may have stopped the run before it was described.
        if self.manifest is not None:
            self.manifest.finished = _utc_now()
            self.manifest.loaded = _loaded_models(self.folder, self.status.notebooks, self.profile)
            if not self.rehearsal:
                self._note_commits(self.manifest)
        self._save_status()
        self._save_manifest()
        _sweep(self.folder, self.secrets)

    def _note_commits(self, manifest: _Manifest) -> None:
        for role, model in manifest.models.items():
            ref = self.profile.models[role]
            # Only now, because a notebook may have downloaded the model.
            model.commit = self.commits.get(ref.id) or _hub_commit(ref)

    def _save_status(self) -> None:
        _write_status(self.folder, self.status, self._redact)

    def _save_manifest(self) -> None:
        if self.manifest is None:
            return
        self.manifest.commits = self.commits
        _write_manifest(self.folder, self.manifest, self._redact)

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
        return RunResult(self.folder, tuple(passed), failed, interrupted)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that cleaning up runs.

    Further ones are ignored to the block's end, so that nothing cuts the cleaning up short. A signal that was ignored
    before (by nohup, say) stays ignored.
    """
    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in stops if signal.getsignal(number) != signal.SIG_IGN}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepared(profile: Profile, folder: Path, console: Console) -> Rehearsal:
    from helpers.planning.rehearsal import prepare

    with console.status("Planning at the true size, and making the small checkpoints"):
        return prepare(profile, folder)


def _pending(plan: _Plan) -> _NotebookStatus:
    return _NotebookStatus(
        status="pending",
        budget_seconds=plan.budget.seconds,
        expected_seconds=plan.budget.expected_seconds,
        inputs=plan.inputs,
    )
