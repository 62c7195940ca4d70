"""How the installed packages differ from a lock file.

Only the standard library is needed: this is asked when a package is missing or damaged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 3


@dataclass(frozen=True)
class _Difference:
    """A package that is not as its ``pin`` says. ``kind``: missing, other (version or build), damaged."""

    pin: str
    kind: str
    found: str


@dataclass(frozen=True)
class _Comparison:
    """The installed packages beside a ``lock`` of so many ``pins``."""

    lock: str
    pins: int
    differences: tuple[_Difference, ...]


def compare_packages(lock: Path | None = None) -> _Comparison:
    """Compare the packages of this Python with a lock file; by default with that of the installed build of torch.

    Raises WorkbookError if they cannot be compared.
    """
    command = [sys.executable, "-I", str(ROOT / "env" / "installed.py"), *([str(lock)] if lock else [])]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
        # The last line: a start-up file of Python may print, too.
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, LookupError, subprocess.CalledProcessError) as error:
        raise WorkbookError(f"The installed packages cannot be compared with the lock ({error}).") from error
    differences = tuple(_Difference(**difference) for difference in told["differences"])
    return _Comparison(told["lock"], told["pins"], differences)


def damage() -> str:
    """A sentence on missing and damaged packages, and what to do about them; empty if none is known."""
    broken = []
    with suppress(WorkbookError):
        broken = [one.found for one in compare_packages().differences if one.kind != "other"]
    if not broken:
        return ""
    shown = "; ".join(broken[:_SHOWN])
    if len(broken) > _SHOWN:
        shown += f" and {len(broken) - _SHOWN} more"
    return f"Packages are not as they were installed: {shown}. Run make setup, which repairs them."
