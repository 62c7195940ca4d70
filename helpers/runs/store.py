"""Read and write the files that ``schema`` describes: the only module that knows their names and their versions.

Version 2 is the first with a number in the file. Files without one, of the version before, are read too, and get the
number when they are written again. Every file is written atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock
from pydantic import BaseModel, TypeAdapter, ValidationError

from helpers.base.errors import WorkbookError
from helpers.base.files import FileError, read_json, read_yaml, write_json
from helpers.runs.paths import _check_links
from helpers.runs.schema import _Claim, _ExpectedValue, _Manifest, _Results, _Status

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 2
_UNNUMBERED = 1  # what a file without a version is
_READABLE = (_UNNUMBERED, VERSION)
_File = TypeVar("_File")
_SHOWN = 100  # letters of a field's name in a message: a damaged file may hold a name of any length
# What to do about a file that cannot be read. Nothing is ever to be deleted: what is damaged may still hold values.
_ADVICE = {
    "results.json": (
        "Restore it from a copy. If there is none, move it out of the folder and keep it, then resume the run: the "
        "notebooks whose values were in it run again."
    ),
    "status.json": (
        "Restore it from a copy. If there is none, move it out of the folder and keep it, then resume the run: its "
        "notebooks run again."
    ),
    "manifest.json": "Restore it from a copy. If there is none, start a new run, and keep this folder for its values.",
}
_OTHER_ADVICE = "Correct the file, or restore it with git."
# A function that blanks secrets in JSON-like data before it reaches the disk.
Redact = Callable[[object], object]


class ResultError(WorkbookError):
    """A value that cannot be recorded, or a file of a run that cannot be read."""


class RunFolderError(WorkbookError):
    """A run folder that is missing, held by another run, not writable, or on a full disk."""


def read_manifest(folder: Path) -> _Manifest:
    """Read ``manifest.json``. Raises RunFolderError if the folder holds no run, ResultError for a damaged file."""
    return _read(_required(folder / "manifest.json"), _Manifest)


def _read_status(folder: Path) -> _Status:
    """Read ``status.json``. Raises RunFolderError if the folder holds no run, ResultError for a damaged file."""
    return _read(_required(folder / "status.json"), _Status)


def _read_results(folder: Path) -> _Results:
    """Read ``results.json``; empty if nothing was recorded. Raises ResultError for a damaged file."""
    path = folder / "results.json"
    _check_links(folder)
    return _read(path, _Results) if path.exists() else _Results()


def read_expected(path: Path, *, required: bool = False) -> dict[str, _ExpectedValue]:
    """Read a file of expected values, by "<notebook>/<name>"; empty if there is none and it is not ``required``.

    Raises ResultError for a damaged file, and for a missing one that is required.
    """
    if not path.exists():
        if required:
            raise ResultError(f"The file {path} is missing. Restore it with git, or make it with workbook expect.")
        return {}
    return _read(path, dict[str, _ExpectedValue])


def _read_claims_file(path: Path) -> dict[str, _Claim]:
    """Read the article's statements, by number. Raises ResultError for a damaged file."""
    return _read(path, dict[str, _Claim], read_yaml)


def _write_manifest(folder: Path, manifest: _Manifest, redact: Redact | None = None) -> None:
    """Write ``manifest.json``, through ``redact`` if it is given."""
    _write(folder / "manifest.json", _dumped(manifest), redact)


def _write_status(folder: Path, status: _Status, redact: Redact | None = None) -> None:
    """Write ``status.json``, through ``redact`` if it is given."""
    _write(folder / "status.json", _dumped(status), redact)


def write_expected(path: Path, values: Mapping[str, _ExpectedValue]) -> None:
    """Write a file of expected values, sorted by key."""
    _write(path, {key: _dumped(values[key]) for key in sorted(values)})


@contextmanager
def _changed_results(folder: Path, redact: Redact | None = None) -> Iterator[_Results]:
    """The content of ``results.json``, to be changed in place and written at the end, by one process at a time.

    It goes through ``redact`` if it is given. Nothing is written if the block raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_links(folder)
    # A notebook may record from several processes (torchrun), and each rewrites the whole file.
    with FileLock(folder / ".results.lock"):
        results = _read_results(folder)
        yield results
        _write(folder / "results.json", _dumped(results), redact)


def _required(path: Path) -> Path:
    _check_links(path.parent)
    if not path.exists() and not path.parent.exists():
        raise RunFolderError(f"{path.parent} is not a run folder: it is missing. Name the folder of a run.")
    if not path.exists():
        raise RunFolderError(f"{path.parent} is not a run folder: it has no {path.name}. {_advice(path)}")
    return path


def _read(path: Path, kind: type[_File], read: Callable[[Path], object] = read_json) -> _File:
    try:
        content = read(path)
    except FileError as error:  # it says what to do
        raise ResultError(str(error)) from error
    except WorkbookError as error:
        raise ResultError(f"{error} {_advice(path)}") from error
    return _validated(path, content, kind)


def _advice(path: Path) -> str:
    return _ADVICE.get(path.name, _OTHER_ADVICE)


def _validated(path: Path, content: object, kind: type[_File]) -> _File:
    if not isinstance(content, dict):
        raise ResultError(f"{path} holds no fields. {_advice(path)}")
    version = content.pop("version", _UNNUMBERED)
    # True == 1 in Python, so the type is looked at too.
    if type(version) is not int or version not in _READABLE:
        raise ResultError(
            f"{path}: the field version is {_short(repr(version))}, but this workbook reads versions up to {VERSION}. "
            "Use the workbook that wrote the file."
        )
    try:
        return TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        raise ResultError(f"{path}: {_complaint(error)}. {_advice(path)}") from error


def _complaint(error: ValidationError) -> str:
    """The first thing that is wrong: which field, and why."""
    first = error.errors(include_url=False)[0]
    field = _short(".".join(str(part) for part in first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if not field:  # what is wrong is between two fields
        return message
    if first["type"] == "missing":
        return f"the field {field} is missing"
    if first["type"] == "extra_forbidden":
        return f"the field {field} is unknown"
    return f"the field {field} is not valid ({message[0].lower()}{message[1:]})"


def _short(text: str) -> str:
    """A text of a damaged file, fit for one line of a message."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _dumped(model: BaseModel) -> dict[str, object]:
    # Not to a JSON text: write_json refuses NaN, which pydantic would turn into null.
    return model.model_dump(mode="json")


def _write(path: Path, content: Mapping[str, object], redact: Redact | None = None) -> None:
    numbered = {"version": VERSION, **content}
    write_json(path, numbered if redact is None else redact(numbered))
