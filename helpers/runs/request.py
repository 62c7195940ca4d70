"""What a run is asked to do, and what is refused before it starts: a wrong folder, profile, machine or kind of run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.text import shell_word
from helpers.models.references import Profile
from helpers.runs.folder import _new_folder
from helpers.runs.notebook import UsageError
from helpers.runs.secrecy import REDACTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from helpers.runs.schema import _Manifest


@dataclass(frozen=True)
class Request:
    """What to run.

    ``profile`` is a Profile or its name; None means laptop, or the resumed run's. ``only`` holds the starts of
    notebooks' names, ``parameters`` texts such as "seed=1". ``resume`` is the folder of a run: what passed there, and
    has the same source, parameters and profile now, is not run again. ``folder`` is where a new run goes, ``notebooks``
    the folder of the notebooks. ``rehearse`` runs them without the profile's machine and models: see
    ``helpers.planning.rehearsal``; a resumed rehearsal stays one.
    """

    profile: Profile | str | None = None
    only: Sequence[str] = ()
    parameters: Sequence[str] = ()
    resume: Path | None = None
    folder: Path | None = None
    notebooks: Path | None = None
    rehearse: bool = False


def _resumed(manifest: _Manifest, request: Request, raw: Mapping[str, str]) -> Request:
    """The request with the profile, notebooks and kind of the earlier run, if it does not name its own.

    Raises UsageError if it names another profile or kind, or leaves out a secret, which no run folder holds.
    """
    rehearsal = manifest.rehearsal is not None
    if request.rehearse and not rehearsal:
        raise UsageError("This run is not a rehearsal. Resume it without --rehearse, or start a rehearsal.")
    profile = request.profile or manifest.profile
    name = profile.name if isinstance(profile, Profile) else profile
    if name != manifest.profile:
        raise UsageError(f"This run is of profile {manifest.profile}, not {name}. Start a new run.")
    for parameter, value in manifest.parameters.items():
        if REDACTED in value and parameter not in raw:
            raise UsageError(f"Secret values are not stored in the run folder. Pass them again: -p {parameter}=...")
    only = request.only or list(manifest.notebooks)
    return replace(request, profile=profile, only=only, rehearse=rehearsal)


def _chosen_profile(request: Request) -> Profile:
    """The profile to run, marked as rehearsed in a rehearsal. Raises UsageError if it needs no rehearsal."""
    from helpers.models.profiles import load_profile

    profile = request.profile
    if not isinstance(profile, Profile):
        profile = load_profile(profile or DEFAULT_PROFILE)
    if not request.rehearse:
        return profile
    if profile.offline:
        raise UsageError(f"All models of profile {profile.name} are on this machine. Run it without --rehearse.")
    return profile.in_rehearsal()


def _check_machine(profile: Profile) -> None:
    """Raise UsageError if the machine is too small for the profile: a download of hours would end in an error."""
    from helpers.machine import hardware
    from helpers.models import profiles

    if not profile.requires.gpus:
        return
    if missing := profiles.missing(profile, hardware.detect_apart(), profiles.downloaded_bytes(profile)):
        needs = "; ".join(missing)
        raise UsageError(
            f"Profile {profile.name} cannot run here: {needs}. "
            f"Run workbook plan --profile {shell_word(profile.name)} to see why."
        )


def _target(request: Request, profile: Profile) -> Path:
    """The folder of a run. Raises UsageError if a new run would go into that of another."""
    folder = request.folder
    if folder and (folder / "status.json").exists():
        raise UsageError(f"{folder} already holds a run. Resume it with --resume, or name another folder.")
    name = f"{profile.name}-rehearsal" if request.rehearse else profile.name
    return (request.resume or folder or _new_folder(name)).absolute()
