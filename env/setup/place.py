"""Where the set-up works: the folders and files, whether .venv may be there, and one set-up at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "env" / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
GIB = 2**30
NEEDED_BYTES = {"cpu": 3 * GIB, "gpu": 10 * GIB, "gpu12": 10 * GIB}
HELD: list[int] = []  # the descriptor of the lock, while this process has it


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def check_place() -> None:
    """Raise SetupError if .venv cannot be here, or belongs to somebody else, who does not give it up."""
    if os.pathsep in str(VENV) or "\n" in str(VENV):
        raise SetupError(f"No virtual environment works in a path with {os.pathsep!r}: {ROOT}. Rename the folder.")
    if VENV.is_symlink() and not VENV.exists():
        raise SetupError(f"{VENV} is a link to {VENV.readlink()}, which is not there. Make it, or remove the link.")
    if VENV.exists() and not VENV.is_dir():
        raise SetupError(f"{VENV} is a file, and the packages belong there. Move it away.")
    if other := other_owner():
        raise SetupError(
            f"{VENV} is a link to the packages of {other}, which this set-up would replace. Remove the link: rm .venv"
        )
    if not VENV.exists() or STAMP.exists() or LOG.exists() or not any(VENV.iterdir()):
        return
    if sys.stdin.isatty() and input(f"make setup has not made {VENV}. Replace all that it holds? [y/N] ") in (
        "y",
        "yes",
    ):
        return
    raise SetupError(f"make setup has not made {VENV}, so it stays as it is. Move it away: mv .venv .venv-mine")


def other_owner() -> Path | None:
    """Return the other checkout whose .venv lies behind the same link: cp -r copies a link, not what it leads to."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        other = Path(json.loads(STAMP.read_text(encoding="utf-8"))["venv"])
        if VENV.is_symlink() and other.samefile(VENV) and not other.parent.samefile(ROOT):
            return other.parent
    return None


def check_disk(free: int, needed: int, folder: Path) -> None:
    """Raise SetupError if fewer bytes are free than needed."""
    if free < needed:
        raise SetupError(
            f"The set-up needs {needed / GIB:.1f} GiB of free disk and {folder} has {free / GIB:.1f} GiB.\n"
            "Free some space, or move this folder to a larger disk. Then run make setup again."
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block no other set-up works on this checkout; waits for one that does."""
    folder = os.open(ROOT, os.O_RDONLY)
    HELD.append(folder)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another make setup works on this folder. Waiting for its end.", flush=True)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        HELD.remove(folder)
        os.close(folder)
