"""The folder of a run: where it is, which process holds it, and the manifest that says what ran.

``schema`` describes the files of the folder, ``store`` reads and writes them.

The manifest is made in two steps: ``_outline`` is known at once, and makes a run that is ended in its first seconds one
that can be resumed; ``_observed`` takes seconds, because it hashes the models and looks at the machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from helpers.base.files import ROOT
from helpers.base.hashes import file_hash
from helpers.base.isolation import conditions, without_git
from helpers.base.processes import Command
from helpers.machine.hardware import DETECT
from helpers.models.checkpoint import LoadError
from helpers.models.hub_cache import repository
from helpers.models.unpacking import packaged_file
from helpers.runs.holding import _LOCK
from helpers.runs.paths import _check_links
from helpers.runs.schema import (
    _GitState,
    _Hardware,
    _Manifest,
    _ModelFacts,
    _NotebookFacts,
    _UnknownHardware,
)
from helpers.runs.store import RunFolderError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from helpers.models.references import ModelRef, Profile
    from helpers.runs.notebook import _Plan

# Executed notebooks, figures and logs of a whole run take some tens of MiB.
GLOSSARY = "GLOSSARY"  # the name of the glossary's file and page, without its ending
LEAST_FREE_BYTES = 100 * 2**20
_LOOK_SECONDS = 0.3


def _new_folder(profile: str) -> Path:
    """The folder of a new run: ``runs/<UTC time>-<profile>``, numbered when that second already has one."""
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{profile}"
    number, folder = 1, ROOT / "runs" / stem
    while folder.exists():
        number += 1
        folder = ROOT / "runs" / f"{stem}-{number}"
    return folder


def _utc_now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Create the folder if it is missing and hold it for this process, until the block ends or the process dies.

    Raises RunFolderError if it cannot be written, if another live run holds it, or if the disk is nearly full.
    """
    _check_links(folder)
    try:
        for part in ("notebooks", "figures", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        # The system releases the lock of a process that dies, so a killed run never blocks its own resume.
        lock = FileLock(folder / _LOCK)
        # Who only looks whether the run is alive, as ``holding`` does, holds it for a moment.
        lock.acquire(timeout=_LOOK_SECONDS)
    except Timeout as error:
        raise RunFolderError(f"Another run is writing to {folder}. Wait for it, or start a new run.") from error
    except OSError as error:
        raise RunFolderError(
            f"Cannot write the run folder {folder} ({error.strerror}). Change its permissions, or name another folder."
        ) from error
    try:
        _check_space(folder)
        _drop_unfinished(folder)
        yield
    finally:
        lock.release()


def _drop_unfinished(folder: Path) -> None:
    """Delete what a writer left that was killed before it renamed its file; the file itself is there, and whole."""
    for name in ("manifest.json", "status.json", "results.json"):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise RunFolderError(f"Only {free / 2**20:.0f} MiB are free for {folder}. Free at least 100 MiB.")


def _executed_notebook(folder: Path, name: str) -> Path:
    """The path of a notebook's executed copy."""
    return folder / "notebooks" / f"{name}.ipynb"


def _kept_glossary(folder: Path) -> Path:
    """The path of the run's copy of the glossary, to which the executed notebooks link."""
    return folder / "notebooks" / f"{GLOSSARY}.md"


def _keep_glossary(folder: Path, notebook: Path) -> None:
    """Copy the glossary that lies beside a notebook, if there is one that can be read."""
    source = notebook.parent / f"{GLOSSARY}.md"
    # Beside a reader's own notebook, a file of this name may be anything: the run does not depend on it.
    if source.is_file():
        with suppress(OSError):
            shutil.copyfile(source, _kept_glossary(folder))


def _outline(profile: Profile, plans: Sequence[_Plan], raw: Mapping[str, str], command: Sequence[str]) -> _Manifest:
    """What is known at once of a run: ``_observed`` adds the rest, and its end ``finished``.

    ``raw`` are the parameters that the command line gave.
    """
    return _Manifest(
        profile=profile.name,
        description=profile.description,
        command=list(command),
        started=_utc_now(),
        parameters=dict(raw),
        seeds=_seeds(plans),
        notebooks={plan.name: _notebook(plan) for plan in plans},
        models={role: _model_facts(ref, {}) for role, ref in profile.models.items()},
        git=_GitState(commit=None, dirty=None),
        python=platform.python_version(),
        packages={},
        hardware=_UnknownHardware(error="it was not looked at"),
        clean_start=conditions(os.environ),
    )


def _observed(outline: _Manifest, profile: Profile) -> _Manifest:
    """The manifest with commit, packages, machine, and the SHA-256 of the models that are here."""
    # torch takes seconds to look at a machine with GPUs, so this waits while the files are hashed; and in a process of
    # its own, because the runner must not hold a CUDA context while notebooks run.
    with Command([sys.executable, "-c", DETECT]) as detection:
        models = {role: _model(ref) for role, ref in profile.models.items()}
        seen = {
            "models": models,
            "git": _git_state(ROOT),
            "packages": _packages(),
            "hardware": _detected(detection),
        }
        return outline.model_copy(update=seen)


def _seeds(plans: Sequence[_Plan]) -> dict[str, object]:
    return {plan.name: plan.effective["seed"] for plan in plans if "seed" in plan.effective}


def _notebook(plan: _Plan) -> _NotebookFacts:
    own = str(plan.path) if plan.own else None
    return _NotebookFacts(sha256=file_hash(plan.path), parameters=plan.effective, own=own)


def _hashes(ref: ModelRef) -> dict[str, str]:
    return {path.name: file_hash(path) for path in _model_files(ref)}


def _model(ref: ModelRef) -> _ModelFacts:
    return _model_facts(ref, _hashes(ref))


def _model_facts(ref: ModelRef, hashes: Mapping[str, str]) -> _ModelFacts:
    facts = asdict(ref) | {"label": ref.label, "sha256": dict(hashes), "commit": _hub_commit(ref)}
    del facts["keep"]  # where copies of a model are kept does not change it
    return _ModelFacts.model_validate(facts)


def _hub_commit(ref: ModelRef) -> str | None:
    """The commit of a hub's model in the cache; None if it is missing, or if the model is not from a hub."""
    if ref.source != "hub":
        return None
    return repository(ref.id).commit_here(ref.revision)


def _model_files(ref: ModelRef) -> list[Path]:
    """The files of a model that came with this repository or a package; a hub's are known by their commit."""
    if ref.source == "embedded":
        return sorted(path for path in (ROOT / ref.id).glob("*") if path.is_file())
    if ref.source == "package":
        with suppress(LoadError):
            return [packaged_file(ref)]
    return []


def _git_state(folder: Path) -> _GitState:
    """The commit of a checkout and whether it holds changes; both None if this very folder is none.

    An unpacked archive may lie inside another repository, whose commit says nothing about it.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if not top or not Path(top).exists() or not Path(top).samefile(folder):
        return _GitState(commit=None, dirty=None)
    commit, changes = (
        _git(folder, "rev-parse", "HEAD"),
        _git(folder, "status", "--porcelain", "--untracked-files=normal"),
    )
    return _GitState(commit=commit, dirty=None if changes is None else bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says about the repository of a folder; None without one.

    Another owner's is asked, too: this very code comes from there. Nothing that it configures is run, and nothing in
    it is changed.
    """
    trusting = ["-c", f"safe.directory={folder.resolve()}", "-c", "core.fsmonitor=false", "--no-optional-locks"]
    command = ["git", *trusting, "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=without_git(os.environ), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip("\n")


def _packages() -> dict[str, str]:
    """The installed packages and their versions."""
    versions = {}
    for package in importlib.metadata.distributions():
        # Of a package that was removed by halves nothing may be known.
        name, version = package.metadata["Name"], package.metadata["Version"]
        if name and version:
            versions[name.lower()] = version
    return dict(sorted(versions.items()))


def _detected(detection: Command) -> _Hardware | _UnknownHardware:
    """What the process found; a run goes on without it."""
    done = detection.result()
    if done.returncode != 0:
        return _UnknownHardware(error=done.errors.strip()[-500:])
    return _Hardware.model_validate_json(done.last_line)
