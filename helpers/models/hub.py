"""Download a model from the Hugging Face Hub, and hash each file once, and again when it has changed.

Everything lands in the hub's own cache (``hub_cache`` knows its layout), so other programs find it there too. Errors
of the hub and of the connection (``hub_errors``), of a full disk and of missing rights become LoadErrors.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import settings
from helpers.base.progress import bar_class
from helpers.base.units import human
from helpers.machine import hardware
from helpers.models.checkpoint import LoadError, _checked, _damaged_files, _inspect
from helpers.models.hub_cache import VERIFIED, _blob_hashes, repository
from helpers.models.hub_errors import _tried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from huggingface_hub import DryRunFileInfo

    from helpers.models.hub_cache import _CachedRepository
    from helpers.models.references import ModelRef

_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def is_here(ref: ModelRef) -> bool:
    """Whether a hub's model is complete in the Hugging Face cache, by names and lengths; the hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(ref.id, revision=_revision(ref), allow_patterns=_HUB_FILES, local_files_only=True)
        _inspect(Path(folder))
    except (LocalEntryNotFoundError, LoadError):
        return False
    return (Path(folder) / "config.json").exists()


def _download(ref: ModelRef, *, verify: bool = False) -> Path:
    """The folder of a hub's model in the Hugging Face cache, downloaded if necessary. Raises LoadError.

    Files that have changed since they were hashed are hashed again, with ``verify`` all of them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    cached = repository(ref.id)
    fetch: Callable[..., Any] = partial(  # with dry_run it returns a list of files, else the folder
        snapshot_download, ref.id, revision=_revision(ref), allow_patterns=_HUB_FILES, tqdm_class=bar_class()
    )

    def ask() -> Path:
        with _disk_errors(ref):
            # If the hub is out of reach, an earlier download may do: if not, the next line says so.
            with suppress(DryRunError):
                _check_disk(ref, fetch(dry_run=True))
            return Path(fetch())

    with _disk_errors(ref):
        cached.remove_partial()
    folder = _tried(ref, ask)
    with _disk_errors(ref):
        damaged = _verify_once(cached, folder, again=verify)
    if damaged:
        raise LoadError(f"{ref.label}: damaged, and removed: {', '.join(damaged)}. Load it again to download them.")
    return folder


def _download_config(ref: ModelRef) -> Path:
    """The folder of a hub's model with its configuration alone. Raises LoadError."""
    from huggingface_hub import hf_hub_download

    def ask() -> str:
        with _disk_errors(ref):
            return hf_hub_download(ref.id, "config.json", revision=_revision(ref))

    return Path(_tried(ref, ask)).parent


@contextmanager
def _disk_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the errors of a full disk, and of a cache without the right to read or write, into LoadErrors."""
    with _full_disk(ref, "HF_HOME", hardware.download_folder()):
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ACCESS:
                raise
            raise LoadError(_no_access(ref, error)) from error


def _no_access(ref: ModelRef, error: OSError) -> str:
    return (
        f"{ref.label}: the Hugging Face cache cannot be used: {error.filename or hardware.download_folder()}: "
        f"{error.strerror}. Give yourself the right to read and write there, or set HF_HOME to a folder of your own."
    )


def _describe_commit(ref: ModelRef, folder: Path) -> str | None:
    """Which commit of a hub's repository a folder holds, and whether the profile pins it; None for other sources."""
    if ref.source != "hub":
        return None
    if ref.revision == folder.name:
        return f"commit {folder.name} (as pinned)"
    return f"commit {folder.name} (what {ref.revision} was: the profile pins no commit)"


def _revision(ref: ModelRef) -> str | None:
    """What to ask the hub for: the commit that a run keeps to, else the profile's revision."""
    return settings.kept_commits().get(ref.id, ref.revision)


def _verify_once(cached: _CachedRepository, snapshot: Path, *, again: bool = False) -> list[str]:
    """Hash the files of a snapshot that were not hashed as they are; returns those that are damaged, and removes them.

    ``again`` hashes all of them: bits that a disk loses change no time.
    """
    from filelock import FileLock

    # In a cache that is read-only nothing can be recorded or removed: the error names what is damaged.
    if not os.access(cached.folder, os.W_OK):
        _checked(snapshot, verify=again)
        return []
    # Of several processes one hashes, and the others read its record.
    with FileLock(cached.folder / f"{VERIFIED}.lock"):
        new = _blob_hashes(snapshot) if again else cached.unverified(snapshot)
        damaged = _damaged_files(snapshot, new) if new else []
        for name in damaged:
            cached.remove(snapshot / name, new.pop(name))
        if new:
            cached.add_verified(snapshot, new)
    return damaged


def _check_disk(ref: ModelRef, files: Iterable[DryRunFileInfo]) -> None:
    cache = hardware.download_folder()
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = hardware.disk_free(cache)
    if needed > free:
        raise LoadError(
            f"{ref.label} needs {human(needed)} more on disk, and {cache} has {human(free)}. "
            "Free some space, or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _full_disk(ref: ModelRef, variable: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a disk that fills up into LoadErrors; ``variable`` names the folder in the environment."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Libraries written in Rust give only the system's text, no error number.
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise LoadError(
            f"{ref.label}: the disk of {folder} is full. Free some space, or set {variable} to a folder on a larger "
            "disk, and try again: complete files are kept."
        ) from error
