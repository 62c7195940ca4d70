"""Nothing outside a run folder is read, written or deleted through a link in it.

A run folder is sent around, and unpacked by somebody else: it is not to be trusted with other files. The names in its
files, which become paths, are checked by ``schema``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

# What the workbook itself reads and writes in a run folder. Anything else in it is the notebooks' own.
_FILES = ("manifest.json", "status.json", "results.json", "report.html")
_LOCKS = (".lock", ".results.lock")
_FOLDERS = ("notebooks", "figures", "logs", "html", "loaded", "work", "rehearsal")


class _OutsideError(WorkbookError):
    """A run folder through which files outside of it would be read, written or deleted."""


def _check_links(folder: Path) -> None:
    """Raise _OutsideError if a link in a run folder leads out of it."""
    root = folder.resolve()
    for path in _own_paths(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise _OutsideError(
                f"{one_line(str(path))} is a link to {one_line(str(path.resolve()))}, outside of the run folder. "
                "Delete the link, or put the file itself in its place."
            )
    for name in _LOCKS:
        lock = folder / name
        # Who takes a lock empties its file, also under its other name.
        if lock.is_file() and lock.stat().st_nlink > 1:
            raise _OutsideError(f"{one_line(str(lock))} has another name outside of the run folder. Delete it.")


def _own_paths(folder: Path) -> Iterator[Path]:
    for name in (*_FILES, *_LOCKS, *_FOLDERS):
        yield folder / name
    for name in _FOLDERS:
        inner = folder / name
        if inner.is_dir() and not inner.is_symlink():
            with os.scandir(inner) as entries:
                yield from [Path(entry.path) for entry in entries]
