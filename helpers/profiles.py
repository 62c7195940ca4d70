"""Read a profile (env/profiles/*.yaml); ``auto`` picks the largest that this machine can run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import hardware, settings
from helpers.types import ROOT, Machine, ModelRef, Profile, WorkbookError, gib

if TYPE_CHECKING:
    import pandas as pd

FOLDER = ROOT / "env" / "profiles"
SMALLEST = "laptop"
LIVES = {"embedded": "in this repository", "package": "in the installed package", "hub": "on the Hugging Face Hub"}


class ProfileError(WorkbookError):
    """A profile that does not exist, or a file of one that is not as it should be."""


def load_profile(name: str = SMALLEST) -> Profile:
    """The profile of that name; "auto": the largest that this machine can run, ``laptop`` where it lacks for all.

    In a rehearsal its models of a hub are marked as rehearsed.

    Raises ProfileError for an unknown name, listing the known ones, and for a file with a key or value that is wrong,
    naming both.
    """
    if name == "auto":
        return _largest(hardware.detect())
    known = [path.stem for path in _files()]
    if name not in known:
        raise ProfileError(f"There is no profile {name!r}; choose auto or one of {', '.join(known)}.")
    profile = read(FOLDER / f"{name}.yaml")
    return rehearsed(profile) if settings.rehearsal_folder() else profile


def rehearsed(profile: Profile) -> Profile:
    """The profile with each model that would come from a hub marked as rehearsed."""
    models = {role: replace(ref, rehearsed=ref.source == "hub") for role, ref in profile.models.items()}
    return replace(profile, **models)


def available() -> tuple[str, ...]:
    """The names of all profiles, from the smallest machine to the largest."""
    return tuple(profile.name for profile in _all())


def lacks(profile: Profile, machine: Machine, downloaded_bytes: int = 0) -> list[str]:
    """What the machine lacks for the profile, a sentence each; empty where it can run.

    ``downloaded_bytes`` of the models are on the disk already and need no further room.
    """
    need = profile.requires
    enough = [gpu for gpu in machine.gpus if gpu.total_bytes >= need.gpu_bytes]
    missing = []
    if len(enough) < need.gpus:
        missing.append(f"needs {_gpus(need.gpus, need.gpu_bytes)}, this machine has {_owned(machine)}")
    if machine.cpu_count < need.cpus:
        missing.append(f"needs {need.cpus} CPUs, this machine has {machine.cpu_count}")
    if machine.ram_bytes < need.ram_bytes:
        missing.append(f"needs {gib(need.ram_bytes)} of memory, this machine has {gib(machine.ram_bytes)}")
    disk = need.disk_bytes - downloaded_bytes
    in_cache = machine.cache_free_bytes is not None and not profile.offline
    free, where = (
        (machine.cache_free_bytes, " for the Hugging Face cache") if in_cache else (machine.disk_free_bytes, "")
    )
    if free < disk:
        missing.append(f"needs {gib(disk)} of free disk, this machine has {gib(free)}{where}")
    return missing


def downloaded_bytes(profile: Profile, cache: Path | None = None) -> int:
    """Bytes of the profile's models that lie in the Hugging Face cache already (``cache``: another folder).

    Of each repository the safetensors at the profile's revision count, and no more than what is to be downloaded of it:
    other formats and revisions take the place of nothing that is missing.
    """
    refs = {ref.id: ref for ref in profile.models.values() if ref.source == "hub"}
    return sum(_downloaded(ref, cache) for ref in refs.values())


def _downloaded(ref: ModelRef, cache: Path | None) -> int:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repo = Path(cache or HF_HUB_CACHE) / repo_folder_name(repo_id=ref.id, repo_type="model")
    revision = ref.revision or "main"
    pointer = repo / "refs" / revision
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
    files = [path for path in (repo / "snapshots" / commit).glob("*.safetensors") if path.exists()]
    size = sum(path.stat().st_size for path in files)
    return size if ref.download_bytes is None else min(size, ref.download_bytes)


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


def read(file: Path) -> Profile:
    """The profile in a file, which names it. Raises ProfileError naming the file and the key that is wrong."""
    import yaml
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    strict = TypeAdapter(dict[str, Profile], config=ConfigDict(extra="forbid"))
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        profile = strict.validate_python({file.stem: {"name": file.stem, **fields}})[file.stem]
    except (yaml.YAMLError, TypeError) as error:
        raise ProfileError(f"{file.name} is not a YAML mapping: {error}") from error
    except ValidationError as error:
        found = (f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        raise ProfileError(f"{file.name}: {'; '.join(found)}") from error
    if {role for group in profile.resident for role in group} != set(profile.models):
        raise ProfileError(f"{file.name}: resident: name each of {', '.join(profile.models)}, and nothing else")
    return profile


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def _all() -> list[Profile]:
    return sorted(map(read, _files()), key=lambda profile: profile.requires.gpus * profile.requires.gpu_bytes)


def _largest(machine: Machine) -> Profile:
    profiles = _all()
    able = [each for each in profiles if not lacks(each, machine, downloaded_bytes(each))]
    return [profiles[0], *able][-1]


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
