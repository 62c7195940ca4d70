"""Profiles: which models the workbook uses on which kind of machine, read from env/profiles/*.yaml.

``load_profile("auto")`` picks the largest that this machine can run.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.errors import WorkbookError, choose, first_names
from helpers.base.files import ROOT, read_yaml
from helpers.base.hub_variables import check_hub_variables
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.units import duration, gib
from helpers.machine import hardware
from helpers.models.hub_cache import _downloaded_bytes
from helpers.models.references import Profile

if TYPE_CHECKING:
    import pandas as pd

    from helpers.machine.hardware import Machine
    from helpers.models.references import ModelRef

FOLDER = ROOT / "env" / "profiles"
LIVES = {"embedded": "in this repository", "package": "in the installed package", "hub": "on the Hugging Face Hub"}


class ProfileError(WorkbookError):
    """A profile that does not exist, or whose file is not valid."""


def load_profile(name: str = DEFAULT_PROFILE) -> Profile:
    """The profile with this name. "auto": the largest that this machine can run, or ``laptop`` if it can run none.

    In a rehearsal, its models from a hub are marked as rehearsed.
    Raises ProfileError for an unknown name, listing the known ones, and for a file with a wrong key or value, naming
    both.
    """
    check_hub_variables()  # the first call of every notebook
    if name == "auto":
        return _largest(hardware.detect())
    choose(name, ["auto", *(path.stem for path in _files())], "profile", ProfileError)
    profile = _read(FOLDER / f"{name}.yaml")
    return profile.in_rehearsal() if settings.rehearsal_folder() else profile


def available() -> tuple[str, ...]:
    """The names of all profiles, from the smallest machine to the largest."""
    return tuple(profile.name for profile in _all())


def missing(profile: Profile, machine: Machine, downloaded_bytes: int = 0) -> list[str]:
    """What the machine does not have of what the profile needs, a phrase each; empty if the profile can run.

    ``downloaded_bytes`` of the models are on the disk already and need no further space.
    """
    need = profile.requires
    enough = [gpu for gpu in machine.gpus if gpu.total_bytes >= need.gpu_bytes]
    phrases = []
    if len(enough) < need.gpus:
        phrases.append(f"needs {_gpus(need.gpus, need.gpu_bytes)}, this machine has {_owned(machine)}")
    if machine.cpu_count < need.cpus:
        phrases.append(f"needs {need.cpus} CPUs, this machine has {machine.cpu_count}")
    if machine.ram_bytes < need.ram_bytes:
        phrases.append(f"needs {gib(need.ram_bytes)} of memory, this machine has {gib(machine.ram_bytes)}")
    disk = need.disk_bytes - downloaded_bytes
    free, where = machine.disk_free_bytes, ""
    if machine.cache_free_bytes is not None and not profile.offline:
        # Downloads go to the cache of the hub, which may lie on another disk than the project.
        free, where = machine.cache_free_bytes, " for the Hugging Face cache"
    if free < disk:
        phrases.append(f"needs {gib(disk)} of free disk, this machine has {gib(free)}{where}")
    return phrases


def downloaded_bytes(profile: Profile, cache: Path | None = None) -> int:
    """Bytes of the profile's models that are already in the Hugging Face cache (``cache``: in another folder).

    Only the safetensors at the profile's revision count, and no more than what is to be downloaded of each repository:
    other formats and revisions replace nothing that is missing.
    """
    # By id: a model that plays two roles is downloaded once.
    refs = {ref.id: ref for ref in profile.models.values() if ref.source == "hub"}
    return sum(_downloaded_bytes(ref, cache) for ref in refs.values())


def table(profile: Profile) -> pd.DataFrame:
    """The first table of every notebook: which model plays which role, and what it stands in for."""
    import pandas as pd

    rows = [
        {
            "role": role,
            "model": ref.id,
            "stands in for": _stands_for(ref),
            "chat format": ref.format,
            "where it lives": LIVES[ref.source],
            "precision": _precision(profile, ref),
        }
        for role, ref in profile.models.items()
    ]
    return pd.DataFrame(rows).set_index("role")


def times(profile: Profile) -> pd.DataFrame:
    """How long each notebook should take with a profile, and when a run ends it; a dash for a time not yet measured.

    This is the one place for such times. The report of a run shows its own beside them.
    """
    import pandas as pd

    budgets = profile.budgets
    expected = [budget.expected_seconds for budget in budgets.values()]
    known = [seconds for seconds in expected if seconds is not None]
    total = sum(known) if len(known) == len(expected) else None
    rows = {"expected": [*map(duration, expected), duration(total)]}
    rows["ended after"] = [duration(budget.seconds) for budget in budgets.values()] + [""]
    return pd.DataFrame(rows, index=pd.Index([*budgets, "all"], name="notebook"))


def _read(file: Path) -> Profile:
    """The profile in a file, with the file's name. Raises ProfileError naming the file and the wrong key."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    strict = TypeAdapter(dict[str, Profile], config=ConfigDict(extra="forbid", strict=True))
    try:
        fields = read_yaml(file)
    except WorkbookError as error:
        raise ProfileError(f"{error} Correct the profile, or restore it with git.") from error
    if not isinstance(fields, dict):
        raise ProfileError(f"{file.name} is not a YAML mapping. Correct the profile, or restore it with git.")
    try:
        # As JSON, in which a list may be a tuple, but a text or true is no number.
        profile = strict.validate_json(json.dumps({file.stem: {"name": file.stem, **fields}}))[file.stem]
    except TypeError as error:
        raise ProfileError(f"{file.name}: A value is a date or of another odd kind. Write a text in quotes.") from error
    except ValidationError as error:
        mistakes = []
        for mistake in error.errors():
            key = ".".join(map(str, mistake["loc"][1:]))  # the first part is the name of the profile
            mistakes.append(f"{key}: {mistake['msg']}")
        raise ProfileError(f"{file.name}: {'; '.join(mistakes)}") from error
    _check_names(profile, file)
    return profile


def _check_names(profile: Profile, file: Path) -> None:
    """Raise ProfileError if parts of a profile that name each other do not agree."""
    if set(chain.from_iterable(profile.resident)) != set(profile.models):
        raise ProfileError(f"{file.name}: resident: Name each of {', '.join(profile.models)}, and nothing else.")
    if others := profile.parameters.keys() - profile.budgets.keys():
        raise ProfileError(f"{file.name}: parameters: There is no budget for {first_names(others)}. Correct the name.")
    if not profile.precisions:
        raise ProfileError(f"{file.name}: precisions: Name at least one, such as {profile.precision}.")
    for role, ref in profile.models.items():
        if ref.published_format not in (None, ref.format):
            raise ProfileError(
                f"{file.name}: {role}.format: {ref.id} was trained on the chat format {ref.published_format!r}, not on "
                f"{ref.format!r}, and answers badly in another. Change the format."
            )


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def _all() -> list[Profile]:
    return sorted(map(_read, _files()), key=lambda profile: profile.requires.gpus * profile.requires.gpu_bytes)


def _largest(machine: Machine) -> Profile:
    smallest, *larger = _all()
    largest = smallest  # even if this machine cannot run it: it needs the least
    for profile in larger:
        if not missing(profile, machine, downloaded_bytes(profile)):
            largest = profile
    return largest


def _precision(profile: Profile, ref: ModelRef) -> str:
    origin = f" (dequantized from {Path(ref.file).name})" if ref.source == "package" and ref.file else ""
    return profile.precision + origin


def _stands_for(ref: ModelRef) -> str:
    if ref.rehearsed:
        return "itself, in a rehearsal: a tiny checkpoint of random weights"
    return ref.stand_in_for or "nothing: it is the real one"


def _gpus(count: int, size: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''} of {size / 1e9:.0f} GB"


def _owned(machine: Machine) -> str:
    kinds = Counter((gpu.name, gpu.total_bytes) for gpu in machine.gpus)
    return " and ".join(f"{count}x {name} of {gib(size)}" for (name, size), count in kinds.items()) or "none"
