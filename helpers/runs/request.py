"""What a run is asked to do, and what is refused before it starts: a wrong folder, profile, machine or kind of run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, choose
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.text import shell_word, well_formed
from helpers.models.references import Profile
from helpers.runs.document import UsageError
from helpers.runs.folder import _new_folder
from helpers.runs.notebook import _left_out, _plan_own, _plan_run
from helpers.runs.secrecy import REDACTED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from helpers.runs.notebook import _Plan
    from helpers.runs.schema import _Manifest


@dataclass(frozen=True)
class Request:
    """What to run.

    ``profile`` is a Profile or its name; None means laptop, or the resumed run's. ``only`` holds the starts of
    notebooks' names, ``parameters`` texts such as "seed=1". ``resume`` is the folder of a run: what passed there, and
    has the same source, parameters and profile now, is not run again. ``folder`` is where a new run goes, ``notebooks``
    the folder of the notebooks; ``own`` are a reader's own notebooks, to run in their place. ``rehearse`` runs them
    without the profile's machine and models: see ``helpers.planning.rehearsal``; a resumed rehearsal stays one.
    ``redo``: in a resumed run, what passed under other code, packages or models, or on another machine, runs again.
    """

    profile: Profile | str | None = None
    only: Sequence[str] = ()
    parameters: Sequence[str] = ()
    resume: Path | None = None
    folder: Path | None = None
    notebooks: Path | None = None
    own: Sequence[Path] = ()
    rehearse: bool = False
    redo: bool = False


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
    _check_secrets(manifest, raw)
    again = replace(request, profile=profile, rehearse=rehearsal)
    if manifest.of_own_notebooks or request.own:
        return replace(again, own=_own_again(manifest, request), only=())
    return replace(again, only=request.only or list(manifest.notebooks))


def _check_secrets(manifest: _Manifest, raw: Mapping[str, str]) -> None:
    for parameter, value in manifest.parameters.items():
        if REDACTED in value and parameter not in raw:
            raise UsageError(f"Secret values are not stored in the run folder. Pass them again: -p {parameter}=...")


def _own_again(manifest: _Manifest, request: Request) -> list[Path]:
    """The reader's own notebooks of the earlier run, where they are now.

    Raises UsageError for a notebook that the run does not have, and for one that is not there any more.
    """
    paths = {name: Path(facts.own) for name, facts in manifest.notebooks.items() if facts.own}
    for path in request.own:
        if path.stem not in paths:
            raise UsageError(f"This run has no notebook of your own called {path.stem!r}. Start a new run for it.")
        paths[path.stem] = path
    chosen = [paths[name] for name in _starting_with(request.only, paths)]
    for path in chosen:
        if not path.is_file():
            raise UsageError(
                f"The notebook {path} of this run is not there any more. If it moved, say where it is: "
                f"workbook run --resume {shell_word(request.resume)} --notebook PATH"
            )
    return chosen


def _starting_with(prefixes: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that start with one of the prefixes; all without any. Raises UsageError for a prefix of none."""
    names = list(names)
    for prefix in prefixes:
        if not prefix.strip() or not any(name.startswith(prefix) for name in names):
            choose(prefix, names, "notebook whose name starts with", UsageError)
    return [name for name in names if not prefixes or name.startswith(tuple(prefixes))]


def _check_combination(request: Request) -> None:
    """Raise UsageError for options that contradict each other."""
    if request.own and request.only and request.resume is None:
        raise UsageError("--only chooses notebooks of the workbook. Leave it out, or leave out --notebook.")


def _plans(
    profile: Profile, request: Request, notebooks: Path, raw: Mapping[str, str], earlier: Mapping[str, str]
) -> tuple[list[_Plan], list[str]]:
    """The planned notebooks, and what to say of them before they run.

    ``notebooks`` is the folder of the workbook's, if the request names no other.
    """
    if request.own:
        plans = _plan_own(profile, request.own, raw, earlier)
        return plans, [plan.remark for plan in plans]
    folder = request.notebooks or notebooks
    plans = _plan_run(profile, folder, request.only, raw, earlier)
    return plans, [] if request.only else _left_out(folder, profile)


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
    _check_folder(request)
    name = f"{profile.name}-rehearsal" if request.rehearse else profile.name
    target = (request.resume or request.folder or _new_folder(name)).resolve()
    # The run's files are in UTF-8, and name their folder.
    if not well_formed(str(target)):
        raise UsageError(f"The folder {target} has bytes in its name that are not UTF-8. Name another folder.")
    return target


def _check_folder(request: Request) -> None:
    folder = request.folder
    if folder and request.resume:
        raise UsageError(f"A resumed run stays in its folder, {request.resume}. Leave out --folder, or --resume.")
    if request.redo and not request.resume:
        raise UsageError("Only a resumed run has something to redo. Name it with --resume, or leave out --redo.")
    if folder and any((folder / name).exists() for name in ("manifest.json", "status.json")):
        raise UsageError(f"{folder} already holds a run. Resume it with --resume, or name another folder.")


def usual_parameters(profile: str, notebooks: Path) -> dict[str, dict[str, object]]:
    """What each notebook of a folder runs with if nobody gives a parameter, by notebook; empty if nobody can tell.

    The notebooks may be damaged, or the profile gone: that is no reason not to judge a run.
    """
    from helpers.models.profiles import load_profile

    usual: dict[str, dict[str, object]] = {}
    with suppress(WorkbookError):
        settings = load_profile(profile)
        for name in settings.budgets:
            with suppress(WorkbookError):
                usual |= {plan.name: plan.effective for plan in _plan_run(settings, notebooks, [name], {}, {})}
    return usual
