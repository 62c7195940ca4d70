"""Before a run: what it is asked, made ready. Whatever cannot run is refused here, before anything starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.units import PRECISIONS
from helpers.runs import store
from helpers.runs.document import UsageError
from helpers.runs.notebook import _left_out, _plan_own, _plan_run
from helpers.runs.parameters import _parse_parameters
from helpers.runs.redaction import _redact
from helpers.runs.request import Request, _check_combination, _check_machine, _chosen_profile, _resumed
from helpers.runs.secrecy import _find_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from helpers.models.references import Profile
    from helpers.planning.rehearsal import Rehearsal
    from helpers.runs.notebook import _Plan


def _planned(
    request: Request, notebooks: Path, console: Console
) -> tuple[dict[str, str], Request, Profile, list[_Plan]]:
    """The parameters, the request with what a resumed run adds, the profile and the plans.

    ``notebooks`` is the folder of the notebooks if the request names none. Raises UsageError for what cannot run.
    """
    _check_combination(request)
    raw = _parse_parameters(request.parameters)
    earlier: dict[str, str] = {}
    if request.resume is not None:
        manifest = store.read_manifest(request.resume)
        request = _resumed(manifest, request, raw)
        earlier = manifest.parameters
    profile = _chosen_profile(request)
    request = replace(request, notebooks=request.notebooks or notebooks)
    plans, remarks = _plans(profile, request, raw, earlier)
    if not request.rehearse:
        _check_machine(profile)
    for remark in remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    return earlier | raw, request, profile, plans


def _plans(
    profile: Profile, request: Request, raw: Mapping[str, str], earlier: Mapping[str, str]
) -> tuple[list[_Plan], list[str]]:
    """The planned notebooks, and what to say of them before they run."""
    if request.own:
        plans = _plan_own(profile, request.own, raw, earlier)
        return plans, [plan.remark for plan in plans]
    folder = request.notebooks or Path()
    plans = _plan_run(profile, folder, request.only, raw, earlier)
    left_out = None if request.only else _left_out(folder, profile)
    return plans, [left_out] if left_out else []


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
