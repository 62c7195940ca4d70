"""Everything that is known about a run at its start and end: the content of ``manifest.json``."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from helpers.hardware import DETECT
from helpers.hub_cache import hub_commit
from helpers.loading import packaged_file
from helpers.processes import Command, Completed
from helpers.runner.folder import utc_now
from helpers.runner.parameters import Plan
from helpers.schema import GitState, Hardware, Manifest, ModelFacts, NotebookFacts, UnknownHardware
from helpers.shards import LoadError, file_hash
from helpers.types import ROOT, ModelRef, Profile


def build_manifest(profile: Profile, plans: Sequence[Plan], raw: Mapping[str, str], command: Sequence[str]) -> Manifest:
    """Collect everything known at the start of a run; ``finished`` is filled in at its end.

    ``raw`` are the parameters that the command line gave. Hashes are SHA-256.
    """
    # torch takes seconds to look at a machine with GPUs, so this waits while the files are hashed; and in a process of
    # its own, because the runner must not hold a CUDA context while notebooks run.
    with Command([sys.executable, "-c", DETECT]) as detection:
        notebooks = {plan.name: _notebook(plan) for plan in plans}
        models = {role: _model(ref) for role, ref in profile.models.items()}
        return Manifest(
            profile=profile.name,
            description=profile.description,
            command=list(command),
            started=utc_now(),
            parameters=dict(raw),
            seeds={plan.name: plan.effective["seed"] for plan in plans if "seed" in plan.effective},
            notebooks=notebooks,
            models=models,
            git=git_state(ROOT),
            python=platform.python_version(),
            packages=packages(),
            hardware=_detected(detection.result()),
        )


def merge_manifests(earlier: Manifest, later: Manifest) -> Manifest:
    """The manifest of a resumed run: as it is now, with the first start, and the notebooks that only then were run."""
    notebooks = earlier.notebooks | later.notebooks
    seeds = earlier.seeds | later.seeds
    return later.model_copy(
        update={
            "started": earlier.started,
            "resumed": [*earlier.resumed, later.started],
            "notebooks": dict(sorted(notebooks.items())),
            "seeds": dict(sorted(seeds.items())),
        }
    )


def git_state(folder: Path) -> GitState:
    """The commit of a checkout and whether it holds changes; both None outside of git."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return GitState(commit=commit, dirty=None if changes is None else bool(changes))


def packages() -> dict[str, str]:
    """The installed packages and their versions."""
    versions = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return dict(sorted(versions.items()))


def _detected(detection: Completed) -> Hardware | UnknownHardware:
    """What the process found; a run goes on without it."""
    if detection.returncode != 0:
        return UnknownHardware(error=detection.errors.strip()[-500:])
    return Hardware.model_validate_json(detection.output)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _notebook(plan: Plan) -> NotebookFacts:
    return NotebookFacts(sha256=file_hash(plan.path), parameters=plan.effective)


def _model(ref: ModelRef) -> ModelFacts:
    hashes = {path.name: file_hash(path) for path in _model_files(ref)}
    facts = asdict(ref) | {"label": ref.label, "sha256": hashes, "commit": hub_commit(ref)}
    return ModelFacts.model_validate(facts)


def _model_files(ref: ModelRef) -> list[Path]:
    """The files of a model that came with this repository or a package; a hub's are known by their commit."""
    if ref.source == "embedded":
        return sorted(path for path in (ROOT / ref.id).glob("*") if path.is_file())
    if ref.source == "package":
        with suppress(LoadError):
            return [packaged_file(ref)]
    return []
