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
from helpers.base.files import read_json, write_json
from helpers.runs.paths import _check_links, _check_names, _inside
from helpers.runs.schema import _Claim, _ExpectedValue, _Manifest, _Results, _Status

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 2
_UNNUMBERED = 1  # what a file without a version is
_READABLE = (_UNNUMBERED, VERSION)
_File = TypeVar("_File")
# A function that blanks secrets in JSON-like data before it reaches the disk.
Redact = Callable[[object], object]


class ResultError(WorkbookError):
    """A value that cannot be recorded, or a file of a run that cannot be read."""


class RunFolderError(WorkbookError):
    """A run folder that is missing, held by another run, not writable, or on a full disk."""


def read_manifest(folder: Path) -> _Manifest:
    """Read ``manifest.json``. Raises RunFolderError if the folder holds no run, ResultError for a damaged file."""
    path = _required(folder / "manifest.json")
    manifest = _read(path, _Manifest)
    _check_names([manifest.profile, *manifest.notebooks], path)
    return manifest


def _read_status(folder: Path) -> _Status:
    """Read ``status.json``. Raises RunFolderError if the folder holds no run, ResultError for a damaged file."""
    path = _required(folder / "status.json")
    status = _read(path, _Status)
    _check_names(status.notebooks, path)
    return status


def _read_results(folder: Path) -> _Results:
    """Read ``results.json``; empty if nothing was recorded. Raises ResultError for a damaged file."""
    path = folder / "results.json"
    _check_links(folder)
    results = _read(path, _Results) if path.exists() else _Results()
    _check_names([*results.values, *results.figures], path)
    for figures in results.figures.values():
        for figure in figures.values():
            _inside(folder, figure, path)
    return results


def read_expected(path: Path, *, required: bool = False) -> dict[str, _ExpectedValue]:
    """Read a file of expected values, by "<notebook>/<name>"; empty if there is none and it is not ``required``.

    Raises ResultError for a damaged file, and for a missing one that is required.
    """
    if not required and not path.exists():
        return {}
    return _read(path, dict[str, _ExpectedValue])


def _read_claims_file(path: Path) -> dict[str, _Claim]:
    """Read the article's statements, by number. Raises ResultError for a damaged file."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ResultError(f"{path} is not valid YAML ({reason}). Correct the file.") from error
    return _validated(path, content, dict[str, _Claim])


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
def _changed_results(folder: Path) -> Iterator[_Results]:
    """The content of ``results.json``, to be changed in place and written at the end, by one process at a time.

    Nothing is written if the block raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A notebook may record from several processes (torchrun), and each rewrites the whole file.
    with FileLock(folder / ".results.lock"):
        results = _read_results(folder)
        yield results
        _write(folder / "results.json", _dumped(results))


def _required(path: Path) -> Path:
    _check_links(path.parent)
    if not path.is_file():
        raise RunFolderError(f"{path.parent} is not a run folder: it has no {path.name}.")
    return path


def _read(path: Path, kind: type[_File]) -> _File:
    try:
        content = read_json(path)
    except WorkbookError as error:
        raise ResultError(str(error)) from error
    return _validated(path, content, kind)


def _validated(path: Path, content: object, kind: type[_File]) -> _File:
    if not isinstance(content, dict):
        raise ResultError(f"{path} holds no fields. Delete the file or restore it.")
    version = content.pop("version", _UNNUMBERED)
    # True == 1 in Python, so the type is looked at too.
    if type(version) is not int or version not in _READABLE:
        raise ResultError(
            f"{path}: the field version is {version!r}, but this workbook reads versions up to {VERSION}. "
            "Use the workbook that wrote the file, or run the notebooks again."
        )
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ResultError(f"{path}: {_complaint(error)}. Restore the file, or run the notebooks again.") from error


def _complaint(error: ValidationError) -> str:
    """The first thing that is wrong: which field, and why."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"the field {field} is missing"
    if first["type"] == "extra_forbidden":
        return f"the field {field} is unknown"
    message = first["msg"].removeprefix("Value error, ")
    return f"the field {field} is not valid ({message[0].lower()}{message[1:]})"


def _dumped(model: BaseModel) -> dict[str, object]:
    # Not to a JSON text: write_json refuses NaN, which pydantic would turn into null.
    return model.model_dump(mode="json")


def _write(path: Path, content: Mapping[str, object], redact: Redact | None = None) -> None:
    numbered = {"version": VERSION, **content}
    write_json(path, numbered if redact is None else redact(numbered))
