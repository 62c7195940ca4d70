"""The one reader of JSON Lines: prompts, items, conversations, texts.

A file holds one JSON object a line, or one JSON array of objects. It is UTF-8, or UTF-16 or UTF-32 that its first
bytes tell. Blank lines mean nothing. Lines end with a line feed, a carriage return or both, and only there: the line
separators of Unicode (U+2028, U+2029) are characters of a text.
"""

from __future__ import annotations

import bisect
import codecs
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helpers.base.errors import WorkbookError
from helpers.base.text import well_formed

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = dict[str, object]
_TOO_DEEP = "It is nested too deeply."
_LISTED = 5  # bad rows that a message describes; the others are counted
_BOM = "\ufeff"
# UTF-32 first: the mark of its little-endian form begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@dataclass(frozen=True)
class BadRow:
    """A row that is not valid: its line, its number among the rows, and the reason as a sentence."""

    line: int
    row: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line} (row {self.row}): {self.reason}"


@dataclass
class _Records:
    """The rows of a file: the valid ones, with the number of their line and row, and the bad ones."""

    path: Path
    valid: list[tuple[int, int, Record]] = field(default_factory=list)  # line, row, object
    bad: list[BadRow] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of rows, valid or not."""
        return len({row for _, row, _ in self.valid} | {bad.row for bad in self.bad})

    def reject(self, line: int, row: int, reason: str) -> None:
        """Note that a row which is JSON is not valid for another reason."""
        bisect.insort(self.bad, BadRow(line, row, reason), key=lambda bad: bad.row)

    def refuse_bad(self, what: str, advice: str = "Correct or remove them.") -> None:
        """Raise WorkbookError if some row is bad; ``what`` the rows should be, such as "items"."""
        if not self.bad:
            return
        lines = [f"  {row}" for row in self.bad[:_LISTED]]
        if len(self.bad) > _LISTED:
            lines.append(f"  and {len(self.bad) - _LISTED} more")
        count = f"{len(self.bad)} of {self.total} rows cannot be used"
        raise WorkbookError("\n".join([f"{self.path}: {count} as {what}.", *lines, advice]))


def read_records(path: Path) -> list[tuple[int, Record]]:
    """The objects of a JSON Lines file, each with the number of its line.

    Raises WorkbookError, which names the file and lists the lines with the reasons, if some row is not valid, or if the
    file is missing, empty or unreadable.
    """
    records = scan_records(path)
    records.refuse_bad("JSON objects")
    return [(line, record) for line, _, record in records.valid]


def scan_records(path: Path) -> _Records:
    """The rows of a JSON Lines file, valid and bad ones apart, for callers that check more.

    Raises WorkbookError if the file is missing, unreadable or without any row.
    """
    records = _Records(path)
    data = _read_bytes(path)
    for row, (line, found) in enumerate(_rows(path, data), 1):
        if isinstance(found, str):
            records.bad.append(BadRow(line, row, found))
        else:
            records.valid.append((line, row, found))
    if not records.total:
        raise WorkbookError(f"{path} is empty. It should hold one JSON object a line.")
    return records


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise WorkbookError(f"{path} is a folder. Give a file with one JSON object a line.")
        if path.exists() and not path.is_file():
            raise WorkbookError(f"{path} is not a regular file. Give a file with one JSON object a line.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WorkbookError(f"There is no file {path}. Check the path.") from error
    except (OSError, ValueError) as error:
        raise WorkbookError(f"{path} cannot be read: {error}. Check the path and its permissions.") from error


def _rows(path: Path, data: bytes) -> Iterator[tuple[int, Record | str]]:
    """The line of each row, and its object or the reason why it has none."""
    text = _decoded(path, data)
    whole = _whole(text) if text is not None else None
    if whole is not None:
        yield from whole
        return
    lines = re.split(r"\r\n|\n|\r", text) if text is not None else re.split(rb"\r\n|\n|\r", data)
    for number, line in enumerate(lines, 1):
        found = _decoded_line(line) if isinstance(line, bytes) else _parsed(line)
        if found is not None:
            yield number, found


def _decoded(path: Path, data: bytes) -> str | None:
    """The text of a file; None if it should be UTF-8 and is not, so that its lines are decoded one by one."""
    encoding = _encoding(data)
    try:
        return data.decode(encoding).removeprefix(_BOM)
    except UnicodeDecodeError as error:
        # Lines can be told apart, and all bad ones named; the elements of an array cannot.
        if encoding == "utf-8" and not data.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
            return None
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise WorkbookError(
            f"{path}, line {line} is not valid {encoding.upper()} ({error.reason}). Save the file as UTF-8."
        ) from error


def _encoding(data: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    # RFC 4627: the zero bytes of the first characters, which are ASCII, tell an encoding that no mark tells.
    return json.detect_encoding(data) if b"\0" in data[:4] else "utf-8"


def _decoded_line(line: bytes) -> Record | str | None:
    try:
        return _parsed(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1}, 0x{line[error.start]:02x}, is not UTF-8. Save the file as UTF-8."


def _whole(text: str) -> Iterator[tuple[int, Record | str]] | None:
    """The rows of a file that is one JSON value over its lines: an array of rows, or a single row; else None."""
    start = _skip(text, 0)
    first, _, rest = text[start:].partition("\n")
    # One complete list on each line is no array, but lines of the wrong kind.
    if text[start : start + 1] == "[" and not (rest.strip() and isinstance(_parsed(first), str) and _is_json(first)):
        return _elements(text, start)
    if text[start : start + 1] == "{" and rest.strip() and not _is_json(first):
        found = _parsed(text)
        if isinstance(found, dict):
            return iter([(_line(text, start), found)])
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _elements(text: str, start: int) -> Iterator[tuple[int, Record | str]]:
    """The elements of a JSON array, each with the line where it begins; what is wrong with it comes last."""
    lines = _LineCounter(text)
    position = _skip(text, start + 1)
    # An empty array has no elements, and nothing is wrong with it.
    while text[position : position + 1] != "]":
        end = _end_of_value(text, position)
        if isinstance(end, str):
            yield lines.at(position), f"{end} Nothing after it was read."
            return
        yield lines.at(position), _parsed(text[position:end]) or ""
        position = _skip(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            yield lines.at(position), "A comma or ] is missing after an element. Nothing after it was read."
            return
        position = _skip(text, position + 1)
        if text[position : position + 1] == "]":
            yield lines.at(position), "The array ends with a comma."
    rest = _skip(text, position + 1)
    if rest != len(text):
        yield lines.at(rest), "The file goes on after its array ends."


def _end_of_value(text: str, position: int) -> int | str:
    """Where a JSON value ends, also one that is refused; or the reason why it does not end."""
    try:
        return _LENIENT.raw_decode(text, position)[1]
    except RecursionError:
        return _TOO_DEEP
    except json.JSONDecodeError as error:
        return f"It is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
    except ValueError as error:
        return f"It is not valid JSON: {error}."


class _LineCounter:
    """Line numbers of growing positions of a text, which is read once."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.position = text, 1, 0

    def at(self, position: int) -> int:
        self.line += self.text.count("\n", self.position, position)
        self.position = position
        return self.line


def _skip(text: str, position: int) -> int:
    """The position after white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _parsed(line: str) -> Record | str | None:
    """The object of a line, the reason why there is none, or None for a blank line."""
    # The mark of an encoding also stands within files that were joined.
    line = line.strip(" \t\r\n" + _BOM)
    if not line:
        return None
    try:
        return _checked(_DECODER.decode(line), line)
    except RecursionError:
        return _TOO_DEEP
    except _RefusedError as refusal:
        return str(refusal)
    except json.JSONDecodeError as error:
        return f"It is not valid JSON: {error.msg} (column {error.colno})."
    except ValueError as error:
        return f"It is not valid JSON: {error}."


def _checked(value: object, source: str) -> Record | str:
    """The value if it is an object whose texts are whole characters, else the reason."""
    if not isinstance(value, dict):
        return f"It is {_KINDS.get(type(value), 'a number')}, not a JSON object."
    # Only an escape can bring half a character into a decoded text.
    if _HALF.search(source) and not well_formed(json.dumps(value, ensure_ascii=False)):
        return "A text in it holds half of a surrogate pair (such as \\ud83d alone), which is no character."
    return value


class _RefusedError(ValueError):
    """Valid for Python's decoder, but not JSON, or not to be told apart."""


def _object(pairs: list[tuple[str, object]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise _RefusedError(f"The key {twice!r} is there twice.")
    return found


def _constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number.")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedError(f"{digits} is too large for a number.")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
_LENIENT = json.JSONDecoder()  # finds where an element ends, also one that is refused
_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
