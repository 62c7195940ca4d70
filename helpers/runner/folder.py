"""The run folder: where it is and who holds it. ``helpers.schema`` describes its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from helpers.store import RunFolderError
from helpers.types import ROOT

# Executed notebooks, figures and logs of a whole run take some tens of MiB.
LEAST_FREE_BYTES = 100 * 2**20


def utc_now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_folder(profile: str) -> Path:
    """The folder of a new run: ``runs/<UTC time>-<profile>``, numbered when that second already has one."""
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{profile}"
    number, folder = 1, ROOT / "runs" / stem
    while folder.exists():
        number += 1
        folder = ROOT / "runs" / f"{stem}-{number}"
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create the folder if it is missing and hold it for this process, until the block ends or the process dies.

    Raises RunFolderError if it cannot be written, if another live run holds it, or if the disk is nearly full.
    """
    try:
        for part in ("notebooks", "figures", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        # The system releases the lock of a process that dies, so a killed run never blocks its own resume.
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunFolderError(f"Another run is writing to {folder}. Wait for it, or start a new run.") from error
    except OSError as error:
        raise RunFolderError(
            f"Cannot write the run folder {folder} ({error.strerror}). Change its permissions, or name another folder."
        ) from error
    try:
        _check_space(folder)
        yield
    finally:
        lock.release()


def executed_notebook(folder: Path, name: str) -> Path:
    """The path of a notebook's executed copy."""
    return folder / "notebooks" / f"{name}.ipynb"


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise RunFolderError(f"Only {free / 2**20:.0f} MiB are free for {folder}. Free at least 100 MiB.")
