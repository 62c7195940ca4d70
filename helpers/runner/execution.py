"""``workbook run``: every notebook in turn, past failures, with status, manifest and resume."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from helpers import results
from helpers.runner.display import Show, display
from helpers.runner.fetching import fetch, named_roles
from helpers.runner.folder import (
    executed_notebook,
    held,
    new_folder,
    read_manifest,
    read_status,
    utc_now,
)
from helpers.runner.manifest import build_manifest, hub_commit, merge_manifests
from helpers.runner.parameters import Plan, UsageError, parse_parameters, plan_run
from helpers.runner.processes import new_mark
from helpers.runner.redaction import REDACTED, find_secrets, redact, sweep
from helpers.runner.supervision import Job, Progress, environment, supervise
from helpers.shards import LoadError
from helpers.types import ROOT, Profile, WorkbookError

if TYPE_CHECKING:
    from helpers.rehearsal import Rehearsal

NOTEBOOKS = ROOT / "notebooks"
DEFAULT_PROFILE = "laptop"


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


def run(
    profile: Profile | str | None = None,
    *,
    only: Sequence[str] = (),
    parameters: Sequence[str] = (),
    resume: Path | None = None,
    folder: Path | None = None,
    notebooks: Path | None = None,
    rehearse: bool = False,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> RunResult:
    """Run the notebooks and return how each ended; a failure does not stop the others.

    ``profile`` is a Profile or its name; None means laptop, or the resumed run's. ``only`` holds the starts of
    notebooks' names, ``parameters`` texts such as "seed=1". ``resume`` is the folder of a run: what passed there, and
    has the same source, parameters and profile now, is not run again. ``folder`` is where a new run goes, ``notebooks``
    where the notebooks are. ``rehearse`` runs them without the profile's machine and models: see ``helpers.rehearsal``;
    a resumed rehearsal stays one.

    The models that the notebooks name are fetched first, outside of all budgets; each is used at the commit that it had
    then, in what is resumed too.

    Raises UsageError before anything runs, RunFolderError when the folder cannot be used, RunError on a full disk or
    where a model cannot be had, RehearsalError when a model would not fit on the profile's machine.
    """
    raw, earlier, console = parse_parameters(parameters), {}, console or Console()
    if resume is not None:
        manifest = read_manifest(resume)
        profile, only, earlier = _resumed(manifest, profile, only, raw)
        rehearse = _is_rehearsal(manifest, rehearse)
    chosen = profile if isinstance(profile, Profile) else _load_profile(profile or DEFAULT_PROFILE)
    if rehearse:
        chosen = _to_rehearse(chosen)
    plans = plan_run(chosen, notebooks or NOTEBOOKS, only, raw, earlier)
    if not rehearse:
        _check_machine(chosen)
    raw, target = earlier | raw, _target(chosen, resume, folder, rehearse)
    with held(target):
        rehearsal = _prepared(chosen, target / "rehearsal", console) if rehearse else None
        session = Session(target, chosen, plans, find_secrets({**os.environ, **raw}), rehearsal)
        return session.run(console, raw, command)


class Session:
    """One run in its folder, which this process holds."""

    def __init__(
        self,
        folder: Path,
        profile: Profile,
        plans: Sequence[Plan],
        secrets: tuple[str, ...],
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.folder, self.profile, self.plans, self.secrets = folder, profile, plans, secrets
        self.rehearsal = rehearsal
        self.resumed = (folder / "status.json").exists()
        self.status = {"state": "running", "peak_bytes": self._earlier_peak(), "notebooks": self._entries()}
        self.manifest: dict[str, Any] = {}
        self.commits: dict[str, str] = read_manifest(folder).get("commits", {}) if self.resumed else {}

    def run(self, console: Console, raw: Mapping[str, str], command: Sequence[str]) -> RunResult:
        """Run what is pending, and leave the folder complete."""
        try:
            with interruptible():
                self._describe(raw, command)
                interrupted = self._run_pending(console)
                self._finish(interrupted)
        except OSError as error:
            with suppress(OSError):
                self._finish(interrupted=True)
            raise RunError(
                f"the run stopped: {error}. Put that right, then go on with: workbook run --resume {self.folder}"
            ) from error
        except LoadError as error:
            self._finish(interrupted=True)
            raise RunError(f"{error} Then go on with: workbook run --resume {self.folder}") from error
        return self._result(interrupted)

    def _entries(self) -> dict[str, dict[str, Any]]:
        """The status of each notebook at the start; of an earlier run in this folder, what still holds."""
        earlier = read_status(self.folder)["notebooks"] if self.resumed else {}
        entries = dict(earlier)
        for plan in self.plans:
            entry = earlier.get(plan.name)
            entries[plan.name] = entry if entry and self._still_holds(plan, entry) else _pending(plan)
        return dict(sorted(entries.items()))

    def _earlier_peak(self) -> int:
        return read_status(self.folder).get("peak_bytes", 0) if self.resumed else 0

    def _still_holds(self, plan: Plan, entry: Mapping[str, Any]) -> bool:
        executed = executed_notebook(self.folder, plan.name).exists()
        return entry["status"] == "passed" and entry["inputs"] == plan.inputs and executed

    def _describe(self, raw: Mapping[str, str], command: Sequence[str]) -> None:
        self.manifest = build_manifest(self.profile, self.plans, raw, command)
        if self.rehearsal:
            self.manifest["rehearsal"] = self.rehearsal.described()
        if self.resumed:
            self.manifest = merge_manifests(read_manifest(self.folder), self.manifest)
        if self.commits:
            self.manifest["commits"] = self.commits
        self._save_manifest()
        self._save_status()

    def _run_pending(self, console: Console) -> bool:
        """Run the pending notebooks; True when a person or the system interrupted this."""
        try:
            self._fetch()
            with display(console) as show:
                for plan in self.plans:
                    show(self.status)
                    if self.status["notebooks"][plan.name]["status"] == "pending":
                        self._run_notebook(plan, show)
                show(self.status)
        except KeyboardInterrupt:
            return True
        return False

    def _fetch(self) -> None:
        """Fetch the models that the pending notebooks name, while no budget runs, and note at which commits."""
        pending = [plan.path for plan in self.plans if self.status["notebooks"][plan.name]["status"] == "pending"]
        roles = named_roles(self.profile, pending)
        if self.rehearsal or self.profile.offline or not roles:
            return
        self.commits |= fetch(self.profile, roles, self.commits)
        self.manifest["commits"] = self.commits
        self._save_manifest()

    def _run_notebook(self, plan: Plan, show: Show) -> None:
        entry = _pending(plan) | {"status": "running", "started": utc_now()}
        self.status["notebooks"][plan.name] = entry
        self._save_status()
        results.forget(self.folder, plan.name)
        executed_notebook(self.folder, plan.name).unlink(missing_ok=True)
        try:
            log = self.folder / "logs" / f"{plan.name}.log"
            progress = supervise(self._job(plan), self._environment(plan), log, partial(self._follow, entry, show))
            self._take(entry, progress)
            entry["status"] = "failed" if progress.reason else "passed"
        except BaseException:
            entry |= {"status": "failed", "reason": f"interrupted at cell {entry['cell']}"}
            raise
        finally:
            sweep(self.folder, self.secrets)
            self._save_status()

    def _follow(self, entry: dict[str, Any], show: Show, progress: Progress) -> None:
        moved = progress.cell != entry["cell"]
        self._take(entry, progress)
        if moved:
            self._save_status()
        show(self.status)

    def _take(self, entry: dict[str, Any], progress: Progress) -> None:
        entry |= redact(_described(progress), self.secrets)
        self.status["peak_bytes"] = max(self.status["peak_bytes"], progress.tree_bytes)

    def _job(self, plan: Plan) -> Job:
        return Job(
            notebook=str(plan.path.absolute()),
            output=str(executed_notebook(self.folder, plan.name)),
            parameters=plan.given,
            seconds=plan.budget.seconds,
            cell_seconds=plan.budget.cell_seconds,
            secrets=self.secrets,
            mark=new_mark(),
        )

    def _environment(self, plan: Plan) -> dict[str, str]:
        workbook = {
            "RUN_DIR": str(self.folder),
            "NOTEBOOK": plan.name,
            "PROFILE": self.profile.name,
            "EXPECTED": str(plan.path.absolute().parent / "expected" / f"{self.profile.name}.json"),
        }
        if self.rehearsal:  # nobody knows what tiny random models should give
            workbook["EXPECTED"] = str(self.rehearsal.folder / "no_expected_values.json")
            return environment({**os.environ, **self.rehearsal.environment()}, True, workbook)
        if self.commits:
            workbook["REVISIONS"] = json.dumps(self.commits)
        return environment(os.environ, self.profile.offline, workbook)

    def _finish(self, interrupted: bool) -> None:
        self.status["state"] = "interrupted" if interrupted else "finished"
        self.manifest["finished"] = utc_now()
        models = {} if self.rehearsal else self.manifest.get("models", {})
        for role, model in models.items():
            ref = self.profile.models[role]
            model["commit"] = self.commits.get(ref.id) or hub_commit(ref)  # a notebook may have downloaded it
        self._save_status()
        self._save_manifest()
        sweep(self.folder, self.secrets)

    def _save_status(self) -> None:
        results.write_json(self.folder / "status.json", redact(self.status, self.secrets))

    def _save_manifest(self) -> None:
        results.write_json(self.folder / "manifest.json", redact(self.manifest, self.secrets))

    def _result(self, interrupted: bool) -> RunResult:
        entries = {plan.name: self.status["notebooks"][plan.name] for plan in self.plans}
        failed = {name: entry["reason"] or "not run" for name, entry in entries.items() if entry["status"] != "passed"}
        passed = tuple(name for name in entries if name not in failed)
        return RunResult(self.folder, passed, failed, interrupted)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that cleaning up runs.

    Further ones are ignored to the block's end, so that nothing cuts the cleaning up short. A signal that was ignored
    before (by nohup, say) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in stops if signal.getsignal(number) != signal.SIG_IGN}

    def interrupt(*_: Any) -> None:
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


def _target(profile: Profile, resume: Path | None, folder: Path | None, rehearse: bool) -> Path:
    """The folder of a run. Raises UsageError where a new run would go into that of another."""
    if folder and (folder / "status.json").exists():
        raise UsageError(f"{folder} holds a run already: go on with --resume, or name another folder")
    name = f"{profile.name}-rehearsal" if rehearse else profile.name
    return (resume or folder or new_folder(name)).absolute()


def _to_rehearse(profile: Profile) -> Profile:
    """The profile marked as rehearsed. Raises UsageError where it needs nothing that this machine may lack."""
    from helpers.profiles import rehearsed

    if profile.offline:
        raise UsageError(f"profile {profile.name} has all its models here: run it without --rehearse")
    return rehearsed(profile)


def _prepared(profile: Profile, folder: Path, console: Console) -> Rehearsal:
    from helpers.rehearsal import prepare

    with console.status("Planning at the true size, and making the small checkpoints"):
        return prepare(profile, folder)


def _is_rehearsal(manifest: Mapping[str, Any], asked: bool) -> bool:
    """Whether the run to go on with is a rehearsal. Raises UsageError where it is none, and one is asked for."""
    found = "rehearsal" in manifest
    if asked and not found:
        raise UsageError("that run is no rehearsal: go on with it without --rehearse, or start a rehearsal")
    return found


def _check_machine(profile: Profile) -> None:
    """Refuse a profile whose GPUs, memory or disk this machine lacks: a download of hours would end in an error."""
    from helpers import hardware, profiles

    if not profile.requires.gpus:
        return
    if missing := profiles.lacks(profile, hardware.detect_apart(), profiles.downloaded_bytes(profile)):
        needs = "; ".join(missing)
        raise UsageError(f"profile {profile.name} cannot run here: {needs} (workbook plan --profile {profile.name})")


def _resumed(
    manifest: Mapping[str, Any], profile: Profile | str | None, only: Sequence[str], raw: Mapping[str, str]
) -> tuple[Profile | str, Sequence[str], dict[str, str]]:
    """The profile, notebooks and parameters of an earlier run, where this one does not name its own."""
    earlier = manifest["profile"]
    name = profile.name if isinstance(profile, Profile) else profile or earlier
    if name != earlier:
        raise UsageError(f"that run is of profile {earlier}, not {name}: start a new run")
    hidden = [key for key, value in manifest["parameters"].items() if REDACTED in value and key not in raw]
    if hidden:
        raise UsageError(f"the run kept no secret: give again -p {hidden[0]}=...")
    return profile or earlier, only or list(manifest["notebooks"]), dict(manifest["parameters"])


def _load_profile(name: str) -> Profile:
    from helpers.profiles import load_profile

    return load_profile(name)


def _pending(plan: Plan) -> dict[str, Any]:
    return {
        "status": "pending",
        "reason": None,
        "cell": 0,
        "cells": 0,
        "line": "",
        "seconds": 0.0,
        "started": None,
        "budget_seconds": plan.budget.seconds,
        "expected_seconds": plan.budget.expected_seconds,
        "peak_bytes": 0,
        "inputs": plan.inputs,
    }


def _described(progress: Progress) -> dict[str, Any]:
    names = ("reason", "cell", "cells", "line", "peak_bytes")
    return {name: getattr(progress, name) for name in names} | {"seconds": round(progress.seconds, 2)}
