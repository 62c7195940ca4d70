"""Download a model from the Hugging Face Hub, hash each file once, and say what to do if the hub refuses.

Everything lands in the hub's own cache (``hub_cache`` knows its layout), so other programs find it there too. Errors
of the hub, of the connection and of a full disk become LoadErrors.
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
from helpers.models.checkpoint import LoadError, _damaged_files, _inspect
from helpers.models.hub_cache import VERIFIED, _blob_hashes, repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from huggingface_hub import DryRunFileInfo

    from helpers.models.hub_cache import _CachedRepository
    from helpers.models.references import ModelRef

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"


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


def _download(ref: ModelRef) -> Path:
    """The folder of a hub's model in the Hugging Face cache, downloaded if necessary. Raises LoadError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    cached = repository(ref.id)
    cached.forget_missing()
    fetch: Callable[..., Any] = partial(  # with dry_run it returns a list of files, else the folder
        snapshot_download, ref.id, revision=_revision(ref), allow_patterns=_HUB_FILES, tqdm_class=bar_class()
    )
    with _hub_errors(ref), _full_disk(ref, "HF_HOME", hardware.download_folder()):
        # If the hub is out of reach, an earlier download may do: if not, the next line says so.
        with suppress(DryRunError):
            _check_disk(ref, fetch(dry_run=True))
        folder = Path(fetch())
    if damaged := _verify_once(cached, folder):
        raise LoadError(f"{ref.label}: damaged during the download, and removed: {', '.join(damaged)}. Load it again.")
    return folder


def _download_config(ref: ModelRef) -> Path:
    """The folder of a hub's model with its configuration alone. Raises LoadError."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(ref):
        file = hf_hub_download(ref.id, "config.json", revision=_revision(ref))
    return Path(file).parent


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


def _verify_once(cached: _CachedRepository, snapshot: Path) -> list[str]:
    """Hash the files of a snapshot that were not hashed yet; returns those that are damaged, which are removed."""
    from filelock import FileLock

    # In a cache that is read-only nothing could be recorded or repaired: there only ``verify=True`` hashes.
    if not os.access(cached.folder, os.W_OK):
        return []
    # Of several processes one hashes, and the others read its record.
    with FileLock(cached.folder / f"{VERIFIED}.lock"):
        verified = cached.verified()
        new = {name: blob for name, blob in _blob_hashes(snapshot).items() if blob not in verified}
        damaged = _damaged_files(snapshot, new) if new else []
        for name in damaged:
            cached.remove(snapshot / name, new[name])
        intact = {blob for name, blob in new.items() if name not in damaged}
        if intact:
            cached.keep_verified(verified | intact)
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


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the hub's errors into LoadErrors that say what to do."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, RuntimeError, HTTPError) as error:
        advice = _refused_token(error) or _hub_advice(ref, error)
        raise LoadError(f"{ref.label} could not be downloaded: {advice} ({type(error).__name__})") from error


def _refused_token(error: Exception) -> str | None:
    """What to do about a token that the hub refuses; None for other errors."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in (error, error.__cause__):
        # The exact class: its subclasses, such as a licence to accept, come with the same status and other advice.
        if type(cause) is HfHubHTTPError and cause.response.status_code == 401:
            return (
                f"the hub does not know this token. Make a new one on {_TOKEN_PAGE}, then run `hf auth login`, or "
                "correct HF_TOKEN."
            )
        if type(cause) is HfHubHTTPError and cause.response.status_code == 403:
            return f"this token may not read it. Give it read access to gated repositories on {_TOKEN_PAGE}."
    return None


def _hub_advice(ref: ModelRef, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{ref.id}"
    # The first class that fits counts, so a subclass must come before its base.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"its licence must be accepted. Do so on {page}, then run `hf auth login` with a token "
        "of the same account.",
        errors.RepositoryNotFoundError: f"{page} does not exist or is private. Check the profile, or run "
        "`hf auth login`.",
        errors.RevisionNotFoundError: f"{page} has no revision {ref.revision}. Correct the profile.",
        errors.IncompleteSnapshotError: "its download is not complete and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE): complete files are kept.",
        errors.LocalEntryNotFoundError: "it was not downloaded yet and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE), or use the profile laptop, which needs no network.",
        errors.HfHubHTTPError: str(error),
        errors.HTTPError: (f"the connection to the hub broke. Load it again: complete files are kept. {error}"),
    }
    for kind, text in advice.items():
        if isinstance(error, kind):
            return text
    return str(error)
