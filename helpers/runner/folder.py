"""The run folder: where it is, who holds it, and its status file.

``status.json``::

    {"state": "running" | "finished" | "interrupted", "peak_bytes": ..,
     "notebooks": {"<notebook>": {"status": "pending" | "running" | "passed" | "failed", "reason": "..",
                                  "cell": 3, "cells": 12, "line": "first line of the cell", "seconds": 4.2,
                                  "started": "2026-01-31T12:00:00Z", "budget_seconds": .., "expected_seconds": ..,
                                  "peak_bytes": .., "inputs": "hash of source, parameters and profile"}}}

A notebook's ``peak_bytes`` is the most resident memory of its processes together, looked at each second; the run's is
the most of all its processes, the runner's own too. Pages that processes share count in each.

``cell`` counts the code cells of the executed notebook from 1, the injected parameters included, as ``In [n]`` does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from helpers.results import read_json
from helpers.types import ROOT, WorkbookError

LEAST_FREE_BYTES = 100 * 2**20


class RunFolderError(WorkbookError):
    """A run folder that is missing, held by another run, not writable, or on a full disk."""


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
    """Create the folder if need be and hold it for this process, until the block ends or the process dies.

    Raises RunFolderError when it cannot be written, when another live run holds it, or when the disk is nearly full.
    """
    try:
        for part in ("notebooks", "figures", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunFolderError(f"another run is writing to {folder}: wait for it, or start a run of its own") from error
    except OSError as error:
        raise RunFolderError(f"cannot write the run folder {folder} ({error.strerror}): see its permissions") from error
    try:
        _check_space(folder)
        yield
    finally:
        lock.release()


def executed_notebook(folder: Path, name: str) -> Path:
    """Where the executed copy of a notebook lies."""
    return folder / "notebooks" / f"{name}.ipynb"


def read_status(folder: Path) -> dict[str, Any]:
    """The content of ``status.json``. Raises RunFolderError when the folder holds no run."""
    return _required(folder / "status.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``manifest.json``. Raises RunFolderError when the folder holds no run."""
    return _required(folder / "manifest.json")


def _required(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunFolderError(f"{path.parent} is not a run folder: it has no {path.name}")
    return read_json(path)


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise RunFolderError(f"only {free / 2**20:.0f} MiB are free for {folder}: make room for at least 100 MiB")
