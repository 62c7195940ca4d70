"""Nothing outside a run folder is read, written or deleted through it: neither by a name in its files, nor by a link.

A run folder is sent around, and unpacked by somebody else: what stands in it is not to be trusted with other files.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What the workbook itself reads and writes in a run folder. Anything else in it is the notebooks' own.
_FILES = ("manifest.json", "status.json", "results.json", "report.html")
_LOCKS = (".lock", ".results.lock")
_FIX = "Correct the file, or take the run folder from where it was made."
_FOLDERS = ("notebooks", "figures", "logs", "html", "loaded", "work", "rehearsal")


class OutsideError(WorkbookError):
    """A run folder through which files outside of it would be read, written or deleted."""


def _check_links(folder: Path) -> None:
    """Raise OutsideError if a link in a run folder leads out of it."""
    root = folder.resolve()
    for path in _own_paths(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise OutsideError(
                f"{one_line(str(path))} is a link to {one_line(str(path.resolve()))}, outside of the run folder. "
                "Delete the link, or put the file itself in its place."
            )
    for name in _LOCKS:
        lock = folder / name
        # Who takes a lock empties its file, also under its other name.
        if lock.is_file() and lock.stat().st_nlink > 1:
            raise OutsideError(f"{one_line(str(lock))} has another name outside of the run folder. Delete it.")


def _own_paths(folder: Path) -> Iterator[Path]:
    for name in (*_FILES, *_LOCKS, *_FOLDERS):
        yield folder / name
    for name in _FOLDERS:
        inner = folder / name
        if inner.is_dir() and not inner.is_symlink():
            with os.scandir(inner) as entries:
                yield from [Path(entry.path) for entry in entries]


def _check_names(names: Iterable[str], file: Path) -> None:
    """Raise OutsideError if the name of a notebook or profile in a file of the run is more than a name."""
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise OutsideError(
                f"{one_line(str(file))} names {one_line(repr(name))}, which leads to other folders. {_FIX}"
            )


def _inside(folder: Path, path: str, file: Path) -> Path:
    """The path in the run folder that one of its files names. Raises OutsideError if it leads out of the folder."""
    plain = PurePosixPath(path)
    target = folder / plain
    if plain.is_absolute() or ".." in plain.parts or not target.resolve().is_relative_to(folder.resolve()):
        raise OutsideError(f"{one_line(str(file))} names {one_line(path)}, which is outside of the run folder. {_FIX}")
    return target
