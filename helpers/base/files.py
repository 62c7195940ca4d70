"""Read and write the project's own files: JSON with clear errors, and writes that are never half done.

``ROOT`` is the folder of the checkout.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from helpers.base.errors import WorkbookError

ROOT = Path(__file__).resolve().parents[2]


def read_json(path: Path) -> object:
    """Read a JSON file. Raises WorkbookError, which names the file, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkbookError(f"The file {path} is missing.") from error
    except ValueError as error:
        raise WorkbookError(f"{path} is not valid JSON ({error}). Delete the file or restore it.") from error


def write_json(path: Path, data: object) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never a part of it."""
    # In the same folder, because a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes files that only their owner can read; a report is for others too.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
