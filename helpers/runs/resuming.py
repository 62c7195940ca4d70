"""What a resumed run keeps: the status and the manifest at its start, made from those of the earlier start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.runs.folder import _executed_notebook
from helpers.runs.holding import _interrupted
from helpers.runs.origins import _last_origin, _same_origin
from helpers.runs.schema import _NotebookStatus, _Status
from helpers.runs.store import _read_results, _read_status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from helpers.runs.notebook import _Plan
    from helpers.runs.schema import _Manifest, _Origin


def _first_status(folder: Path, plans: Sequence[_Plan]) -> _Status:
    """The status at the start of a run; of an earlier start in this folder, what still holds.

    A notebook is kept if it passed, with the same inputs, and all that it left is there.
    """
    # The status of a resumed run may have been moved away, because it was damaged: then everything runs again.
    if not (folder / "status.json").exists():
        return _Status(state="running", notebooks={plan.name: _pending(plan) for plan in plans})
    earlier, recorded = _read_status(folder), _read_results(folder)
    entries = dict(earlier.notebooks)
    for entry in entries.values():
        if entry.status == "running":  # the runner was killed
            entry.status, entry.reason = "failed", _interrupted(entry)
    for plan in plans:
        values = len(recorded.values.get(plan.name, {}))
        if plan.name not in entries or not _still_holds(folder, plan, entries[plan.name], values):
            entries[plan.name] = _pending(plan)
    return _Status(state="running", peak_bytes=earlier.peak_bytes, notebooks=dict(sorted(entries.items())))


def _still_holds(folder: Path, plan: _Plan, entry: _NotebookStatus, values: int) -> bool:
    executed = _executed_notebook(folder, plan.name).exists()
    whole = entry.recorded is None or values >= entry.recorded
    return entry.status == "passed" and entry.inputs == plan.inputs and executed and whole


def _pending(plan: _Plan) -> _NotebookStatus:
    return _NotebookStatus(
        status="pending",
        budget_seconds=plan.budget.seconds,
        expected_seconds=plan.budget.expected_seconds,
        inputs=plan.inputs,
    )


def _merge_manifests(earlier: _Manifest, later: _Manifest) -> _Manifest:
    """The manifest of a resumed run: as it is now, with the first start, and what is known of each notebook so far.

    A notebook that starts again takes its new facts then, see ``upkeep``.
    """
    origins, notebooks = list(earlier.origins), dict(earlier.notebooks)
    if not origins:  # of an earlier workbook: what it kept is the origin of all that is there
        origins = [_last_origin(earlier)]
        notebooks = {name: facts.model_copy(update={"origin": 0}) for name, facts in notebooks.items()}
    return later.model_copy(
        update={
            "started": earlier.started,
            "resumed": [*earlier.resumed, later.started],
            "notebooks": dict(sorted({**later.notebooks, **notebooks}.items())),
            "seeds": dict(sorted({**later.seeds, **earlier.seeds}.items())),
            "origins": origins,
            "clean_start": list(dict.fromkeys([*earlier.clean_start, *later.clean_start])),
        }
    )


def _of_another_origin(manifest: _Manifest, status: _Status, plans: Sequence[_Plan], now: _Origin) -> list[_Plan]:
    """The plans of the notebooks that passed earlier, under another origin than the one of now."""
    same = {place for place, origin in enumerate(manifest.origins) if _same_origin(origin, now)}
    others = []
    for plan in plans:
        if status.notebooks[plan.name].status == "passed" and manifest.notebooks[plan.name].origin not in same:
            others.append(plan)
    return others
