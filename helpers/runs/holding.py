"""Whether a live process runs a run, and its status as it is now: a killed runner leaves a file that says "running"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.runs.store import _read_status

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.runs.schema import _NotebookStatus, _Status

_LOCK = ".lock"  # in a run's folder; the system releases it when its holder dies


def _is_held(folder: Path) -> bool:
    """True if a live process holds the run's folder."""
    import fcntl

    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # without the file, or without the right to read it, nothing says that somebody holds it
        return False
    return False


def _status_now(folder: Path) -> _Status:
    """The status of a run as it is now: one whose file says "running", and that nobody runs, is interrupted.

    Raises RunFolderError if the folder holds no run, ResultError for a damaged file.
    """
    status = _read_status(folder)
    if status.state != "running" or _is_held(folder):
        return status
    status = _read_status(folder)  # it may have ended between the two looks
    if status.state == "running":
        status.state, status.abandoned = "interrupted", True
        for entry in status.notebooks.values():
            if entry.status == "running":
                entry.status, entry.reason = "failed", _interrupted(entry)
    return status


def _interrupted(entry: _NotebookStatus) -> str:
    """Why a notebook did not go on after its run was ended."""
    return f"interrupted at cell {entry.cell}"
