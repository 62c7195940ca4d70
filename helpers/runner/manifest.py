"""What a run needs to be told apart from, and compared with, another: ``manifest.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.hardware import DETECT
from helpers.loading import LoadError, file_hash, packaged_file
from helpers.runner.folder import utc_now
from helpers.runner.parameters import Plan
from helpers.types import ROOT, ModelRef, Profile


def build_manifest(
    profile: Profile, plans: Sequence[Plan], raw: Mapping[str, str], command: Sequence[str]
) -> dict[str, Any]:
    """Everything known at the start of a run; ``finished`` is filled in at its end.

    ``parameters`` are what the command line gave, ``notebooks`` hold the effective ones. Hashes are SHA-256.
    """
    with subprocess.Popen([sys.executable, "-c", DETECT], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as detection:
        manifest = {
            "profile": profile.name,
            "description": profile.description,
            "command": list(command),
            "started": utc_now(),
            "finished": None,
            "parameters": dict(raw),
            "seeds": {plan.name: plan.effective["seed"] for plan in plans if "seed" in plan.effective},
            "notebooks": {plan.name: _notebook(plan) for plan in plans},
            "models": {role: _model(ref) for role, ref in profile.models.items()},
            "git": git_state(ROOT),
            "python": platform.python_version(),
            "packages": packages(),
        }
        output, errors = detection.communicate()
    hardware = json.loads(output) if detection.returncode == 0 else {"error": errors.decode().strip()[-500:]}
    return manifest | {"hardware": hardware}


def merge_manifests(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a resumed run: as it is now, with the first start, and the notebooks that only then were run."""
    merged = {**later, "started": earlier["started"], "resumed": [*earlier.get("resumed", []), later["started"]]}
    for key in ("notebooks", "seeds"):
        merged[key] = dict(sorted({**earlier[key], **later[key]}.items()))
    return merged


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of a checkout and whether it holds changes; both None outside of git."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def packages() -> dict[str, str]:
    """The installed packages and their versions."""
    found = {one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}
    return dict(sorted(found.items()))


def hub_commit(ref: ModelRef) -> str | None:
    """The commit that a hub's model is at in the Hugging Face cache; None where it is not there, or no hub's."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(ref.id, "config.json", revision=ref.revision) if ref.source == "hub" else None
    return Path(config).parent.name if isinstance(config, str) else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _notebook(plan: Plan) -> dict[str, Any]:
    return {"sha256": file_hash(plan.path), "parameters": plan.effective}


def _model(ref: ModelRef) -> dict[str, Any]:
    hashes = {path.name: file_hash(path) for path in _model_files(ref)}
    return asdict(ref) | {"label": ref.label, "sha256": hashes, "commit": hub_commit(ref)}


def _model_files(ref: ModelRef) -> list[Path]:
    """The files of a model that came with this repository or a package; for a hub's, see ``hub_commit``."""
    if ref.source == "embedded":
        return sorted(path for path in (ROOT / ref.id).glob("*") if path.is_file())
    if ref.source == "package":
        with suppress(LoadError):
            return [packaged_file(ref)]
    return []
