"""The manifest of a run while the run goes on: what becomes known is added to it, and the file is written at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.files import ROOT
from helpers.runs import store
from helpers.runs.folder import _git_state, _hub_commit, _notebook, _observed, _seeds, _utc_now
from helpers.runs.notebook import _loaded_models
from helpers.runs.origins import _code_hash, _last_origin, _place
from helpers.runs.resuming import _merge_manifests
from helpers.runs.store import _write_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from helpers.models.references import Profile
    from helpers.runs.notebook import _Plan
    from helpers.runs.schema import _Manifest
    from helpers.runs.store import Redact


class _Upkeep:
    """The manifest in a run folder, and that of the earlier start if the run is resumed.

    ``commits`` are those of the hub's models, at which a resumed run uses them again.
    """

    def __init__(self, folder: Path, profile: Profile, redact: Redact) -> None:
        self.folder, self.profile, self.redact = folder, profile, redact
        self.earlier = store.read_manifest(folder) if (folder / "manifest.json").exists() else None
        self.commits = self.earlier.commits if self.earlier else {}
        self.code = _code_hash()
        self.manifest: _Manifest | None = None  # of a resumed run, until the machine was looked at

    def begin(self, outline: _Manifest) -> None:
        """Write what is known at once of a new run. A resumed run keeps its file until more is known."""
        if self.earlier is None:
            self.manifest = outline
            self.save()

    def observe(self, outline: _Manifest) -> _Manifest:
        """Add what takes seconds to see, and what is known of the earlier start; ``save`` writes it."""
        manifest = _observed(outline, self.profile)
        if self.earlier is not None:
            manifest = _merge_manifests(self.earlier, manifest)
        self.manifest = manifest
        return manifest

    def note_commits(self, commits: Mapping[str, str]) -> None:
        """Note at which commits models were fetched."""
        self.commits |= commits
        self.save()

    def note_start(self, plan: _Plan) -> None:
        """Note with what a notebook starts, in case somebody changed it since the run began."""
        if self.manifest is None:
            return
        code = _code_hash()
        if code != self.code:
            self.code, self.manifest.git = code, _git_state(ROOT)
        place = _place(self.manifest.origins, _last_origin(self.manifest, code, _utc_now()))
        self.manifest.notebooks[plan.name] = _notebook(plan).model_copy(update={"origin": place})
        self.manifest.seeds |= _seeds([plan])
        self.save()

    def finish(self, notebooks: Iterable[str], *, rehearsed: bool) -> None:
        """Write what is known only at the end."""
        # A full disk may have stopped the run before it was described.
        if self.manifest is None:
            return
        self.manifest.finished = _utc_now()
        self.manifest.loaded = _loaded_models(self.folder, notebooks, self.profile)
        # A notebook may have downloaded a model since the start.
        if not rehearsed:
            for role, model in self.manifest.models.items():
                ref = self.profile.models[role]
                model.commit = self.commits.get(ref.id) or _hub_commit(ref)
        self.save()

    def save(self) -> None:
        """Write the manifest, if there is one yet."""
        if self.manifest is None:
            return
        self.manifest.commits = self.commits
        _write_manifest(self.folder, self.manifest, self.redact)
