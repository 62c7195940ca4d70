"""Read and write the project's own files: JSON and YAML with clear errors, and writes that are never half done.

``ROOT`` is the folder of the checkout.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helpers.base.errors import WorkbookError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

ROOT = Path(__file__).resolve().parents[2]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Plain words that YAML 1.1 reads as something else: numbers in base 8, 2, 16 and 60, yes and no, and dates.
_MISREAD = re.compile(
    r"[-+]?0[0-7_]+|[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|yes|no|on|off"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*",
    re.IGNORECASE,
)
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class FileError(WorkbookError, OSError):
    """A file that cannot be read or written. It is an OSError too, whose ``errno`` and ``strerror`` say why."""

    def __init__(self, message: str, cause: OSError) -> None:
        super().__init__(message)
        self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])


def read_json(path: Path) -> object:
    """Read a JSON file. Raises WorkbookError, which names the file, if it is missing, unreadable or damaged.

    What the JSON module lets pass is damage here: NaN and infinity, a key that stands twice in an object, and letters
    that no text can hold.
    """
    text = _read_text(path, "JSON")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        # An escaped half of a letter is found only when somebody writes it, in the midst of something else.
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise WorkbookError(f"{path} is not valid JSON ({_reason(error)}).") from error
    return content


def read_yaml(path: Path) -> object:
    """Read a YAML file. Raises WorkbookError, which names the file, if it is missing, unreadable or damaged.

    A key that stands twice in a mapping is damage, too, and so is a word that YAML 1.1 turns into something else than
    it says: 010 into 8, 1:30 into 90, yes into true. Quoted words are texts.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Of the library's safe loader, which lets the last of equal keys win without a word."""

        def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
            if isinstance(node, yaml.ScalarNode) and node.style is None and _MISREAD.fullmatch(node.value):
                raise ValueError(
                    f"{node.value} at line {node.start_mark.line + 1} could be taken for another value: write a number "
                    "in decimal digits, true or false for yes or no, and a text in quotes"
                )
            return super().construct_object(node, deep)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := _twice(names):
                line = node.start_mark.line + 1
                raise ValueError(f"the key {twice} stands twice in the mapping at line {line}")
            return super().construct_mapping(node, deep)

    text = _read_text(path, "YAML")
    try:
        return yaml.load(text, Loader)
    # Of a date such as 2026-99-99, the library raises a plain ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise WorkbookError(f"{path} is not valid YAML ({_reason(error)}).") from error


def _read_text(path: Path, kind: str) -> str:
    """The text of a file. Reading a pipe would wait for ever, so only a plain file is read."""
    try:
        if path.exists() and not path.is_file():
            raise WorkbookError(f"{path} is not a file. Move what is in its place, and restore the file.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise WorkbookError(f"The file {path} is missing.") from error
    except OSError as error:
        raise FileError(f"Cannot read {path} ({error.strerror}). {_advice(error)}", error) from error
    except UnicodeDecodeError as error:
        raise WorkbookError(f"{path} is not valid {kind} (it is not in UTF-8: {_reason(error)}).") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"the key {_twice([name for name, _ in pairs])} stands twice in one object")
    return content


def _twice(names: Sequence[str]) -> str | None:
    """The first name that is there before; None if there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return repr(name[:80])
        seen.add(name)
    return None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, which JSON does not have")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a letter, a lone surrogate"
    return " ".join(str(error).split())


def write_json(path: Path, data: object) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never a part of it.

    Raises FileError if it cannot be written; what was there before is kept.
    """
    try:
        _write_whole(path, text)
    except OSError as error:
        raise FileError(f"Cannot write {path} ({error.strerror}). {_advice(error)}", error) from error


def _write_whole(path: Path, text: str) -> None:
    # In the same folder, because a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes files that only their owner can read; a report is for others too, unless its owner closed it.
        temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o644)
        temporary.replace(path)
    except BaseException:
        # An interrupt may come after the renaming: it must stay the interrupt, and not become a missing file.
        temporary.unlink(missing_ok=True)
        raise


def _advice(error: OSError) -> str:
    """What to do about an error of the disk."""
    if error.errno in _FULL:
        return "Free some space on the disk."
    if error.errno in _FORBIDDEN:
        return "Change its permissions, or work on a copy in a folder of your own."
    if error.errno == errno.ENOENT:
        return "Make its folder."
    return "Check the disk and the path."
