"""The hashes of a folder's files, recorded beside them in hashes.json when they are made, and compared on each use.

    {"of": "falcon-mini", "sha256": {"config.json": "...", "model.safetensors": "..."}}

Comparing costs little: a file whose identity, size and times are unchanged is read once a run, not once a use.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.errors import WorkbookError, first_names
from helpers.base.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

HASHES = "hashes.json"
_FOLDER = "additional_chat_templates"  # the one folder below a model's that transformers reads
# What libraries read from a folder without being told to; documentation beside it may change freely.
_KINDS = frozenset({".bin", ".jinja", ".json", ".jsonl", ".model", ".pt", ".pth", ".safetensors", ".txt"})
_KEPT = ".hashed.json"  # in a run's folder: what its processes have hashed so far
_SETTLED = 2_000_000_000  # nanoseconds: a file changed twice within the clock's steps would keep its times
_known: dict[str, str] = {}  # the hash of each state of a file that this process has seen


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. An unchanged file is read once by a process, and once by all of a run's."""
    status = file.stat()
    state = _state(status)
    if state not in _known:
        _known.update(_kept(settings.run_folder()))
    if state in _known:
        return _known[state]
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - status.st_ctime_ns > _SETTLED:
        _known[state] = digest
        if (run := settings.run_folder()) is not None:
            share_hashes(run)
    return digest


def share_hashes(run: Path) -> None:
    """Keep what this process has hashed for the other processes of a run. A folder without rights is no error."""
    with suppress(OSError):
        write_json(run / _KEPT, _known)


def write_hashes(folder: Path, of: str = "") -> None:
    """Record the hashes of the files that libraries read from ``folder``; ``of`` names what they are."""
    names = sorted(file.name for file in _read_files(folder))
    write_json(folder / HASHES, {"of": of, "sha256": {name: file_hash(folder / name) for name in names}})


def changes(folder: Path, of: str = "") -> list[str]:
    """What differs from the record, a phrase for each file, such as "config.json is missing"; empty if nothing does.

    A file that libraries would read and that is not recorded is a difference too, and so is a record that is missing,
    damaged, or of something else than ``of``.
    """
    recorded = _recorded(folder, of)
    if isinstance(recorded, str):
        return [recorded]
    phrases = []
    for name, digest in recorded.items():
        if found := _difference(folder / name, digest):
            phrases.append(f"{name} {found}")
    try:
        files = _read_files(folder)
    except OSError as error:
        return [f"the folder cannot be read ({error.strerror})"]
    for file in files:
        if file.name not in recorded:
            phrases.append(f"{file.name} does not belong there")
    if (folder / _FOLDER).exists():
        phrases.append(f"{_FOLDER} does not belong there")
    return phrases


@contextmanager
def unchanged(folder: Path, error: type[WorkbookError]) -> Iterator[None]:
    """Raise ``error`` if a file that libraries read from ``folder`` changes, or goes, while the block reads them."""
    before = _states(folder)
    yield
    after = _states(folder)
    if changed := [name for name, state in before.items() if after.get(name) != state]:
        raise error(
            f"{first_names(changed)} in {folder} changed while it was read, so nobody knows what was. Find out what "
            "writes there, and repeat the call."
        )


def _states(folder: Path) -> dict[str, str]:
    return {file.name: _state(file.stat()) for file in _read_files(folder)}


def _state(status: os.stat_result) -> str:
    # Nobody can set the time of the last change of an inode (ctime), so a file changed in place has another state.
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _recorded(folder: Path, of: str) -> dict[str, str] | str:
    """The recorded hashes by file name, or what is wrong with the record."""
    try:
        record = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        recorded = {str(name): str(digest) for name, digest in record["sha256"].items()}
        owner = str(record["of"])
    except FileNotFoundError:
        return f"{HASHES} is missing"
    except OSError as error:
        return f"{HASHES} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{HASHES} is damaged"
    # A name with a folder in it would lead out of the folder.
    if not recorded or any(Path(name).name != name for name in recorded):
        return f"{HASHES} is damaged"
    if of and owner != of:
        return f"{HASHES} is of {owner}, not of {of}"
    return recorded


def _difference(file: Path, digest: str) -> str | None:
    try:
        return None if file_hash(file) == digest else "is not the file that was recorded"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _read_files(folder: Path) -> list[Path]:
    """The files of a folder that libraries read, in alphabetical order."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return [folder / name for name in sorted(names) if Path(name).suffix in _KINDS and name != HASHES]


def _kept(run: Path | None) -> dict[str, str]:
    """What the other processes of the run have hashed."""
    if run is None:
        return {}
    try:
        kept = json.loads((run / _KEPT).read_text(encoding="utf-8"))
        return {str(state): str(digest) for state, digest in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}
