"""Keep secrets out of the files of a folder, whoever wrote them: in texts, in files' names, in binary files.

In a binary file only a token or a long secret is hidden, which no numbers hold by chance, and the file stays readable:
the secret is overwritten with asterisks, and the check sums of PNG and zip files (npz, a torch checkpoint) are made
anew. A file is replaced, never changed in place, and no link is followed: what lies outside stays as it is.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING

from helpers.base.files import write_json, write_text
from helpers.runs.encodings import _asterisks, _clean_bytes
from helpers.runs.redaction import _Hider, _hider, _redact

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator

_JSON_SUFFIXES = {".json", ".ipynb"}
_ZIP = b"PK\x03\x04"
_SNIFFED = 8192
# A larger binary file holds weights, and gigabytes would be read after each notebook: its two ends tell what it is. A
# larger text, such as a log, is read whole.
_LARGE = 64 * 2**20
_END = 2**20
Seen = dict[Path, tuple[int, int, int]]  # what a file was like when it was found clean


def _sweep(folder: Path, secrets: Iterable[str], seen: Seen | None = None) -> list[Path]:
    """Redact every file below ``folder`` that holds a secret or is named by one, and return the files changed.

    ``seen`` is this function's memory between two calls: a file that has not changed since is not read again.
    """
    secrets, seen = tuple(secrets), {} if seen is None else seen
    hider = _hider(secrets)
    changed = []
    for path in _files(folder):
        state = _state(path)
        if seen.get(path) != state and _clean(path, secrets, hider):
            changed.append(path)
        seen[path] = _state(path)
    changed += [path for path in _renamed(folder, hider) if path not in changed]
    return sorted(changed)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=False):
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                yield path


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _clean(path: Path, secrets: tuple[str, ...], hider: _Hider) -> bool:
    """Redact one file; True if that changed it."""
    with path.open("rb") as stream:
        beginning = stream.read(_SNIFFED)
    if b"\0" in beginning or path.stat().st_size > _LARGE:
        return _clean_binary(path, beginning, hider.in_binary)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return _clean_binary(path, beginning, hider.in_binary)
    if hider.everything(text) == text and not _written_otherwise(path, text):
        return False
    return _clean_text(path, text, secrets, hider)


def _written_otherwise(path: Path, text: str) -> bool:
    # JSON may write any letter as \u0041: only its values tell.
    return path.suffix in _JSON_SUFFIXES and "\\u00" in text


def _clean_text(path: Path, text: str, secrets: tuple[str, ...], hider: _Hider) -> bool:
    if path.suffix in _JSON_SUFFIXES:
        with suppress(ValueError, RecursionError):  # a damaged file, or one that holds NaN, is text like any other
            data = json.loads(text)
            hidden = _redact(data, secrets)
            if hidden == data:
                return False
            write_json(path, hidden)
            return True
    write_text(path, hider.everything(text))
    return True


def _clean_binary(path: Path, beginning: bytes, pattern: re.Pattern[bytes]) -> bool:
    size = path.stat().st_size
    if size > _LARGE:
        return _clean_in_place(path, range(0, size, _END) if b"\0" not in beginning else (0, size - _END), pattern)
    if beginning.startswith(_ZIP):
        with suppress(zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError):  # else it is bytes as any other
            return _replace(path, _clean_zip(path, pattern))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if pattern.search(mapped) is None:
            return False
    return _replace(path, _clean_bytes(path.read_bytes(), pattern))


def _clean_in_place(path: Path, starts: Iterable[int], pattern: re.Pattern[bytes]) -> bool:
    """Overwrite what a large file holds from ``starts`` on, a MiB each and a little more: a secret may lie across."""
    changed = False
    if path.stat().st_nlink > 1:  # another name of it may lie outside of the folder
        return False
    with path.open("r+b") as stream:
        for start in starts:
            stream.seek(start)
            for match in pattern.finditer(stream.read(_END + _SNIFFED)):
                stream.seek(start + match.start())
                stream.write(_asterisks(match))
                changed = True
    return changed


def _clean_zip(path: Path, pattern: re.Pattern[bytes]) -> bytes | None:
    """A zip file whose members and their names hold no secret; None: nothing to change."""
    written, changed = io.BytesIO(), False
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(written, "w") as target:
        target.comment = pattern.sub(_asterisks, source.comment)
        for member in source.infolist():
            data = source.read(member)
            cleaned = pattern.sub(_asterisks, data)
            name = pattern.sub(_asterisks, member.filename.encode()).decode()
            changed = changed or cleaned != data or name != member.filename or target.comment != source.comment
            info = zipfile.ZipInfo(name, member.date_time)
            info.compress_type, info.external_attr = member.compress_type, member.external_attr
            target.writestr(info, cleaned)
    return written.getvalue() if changed else None


def _replace(path: Path, content: bytes | None) -> bool:
    """Put new content in the place of a file, at once; another name of the old file keeps the old content."""
    if content is None:
        return False
    handle, name = mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        shutil.copymode(path, name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


def _renamed(folder: Path, hider: _Hider) -> Iterator[Path]:
    """Give each file and folder whose name holds a secret another name, and return the new paths.

    A link whose target is named by a secret leads nowhere from then on.
    """
    for parent, folders, names in os.walk(folder, topdown=False, followlinks=False):
        for name in sorted([*folders, *names]):
            _clean_link(Path(parent, name), hider)
            hidden = hider.everything(name)
            if hidden != name:
                target = _free(Path(parent), hidden)
                Path(parent, name).rename(target)
                yield target


def _clean_link(path: Path, hider: _Hider) -> None:
    if path.is_symlink() and (hidden := hider.everything(str(path.readlink()))) != str(path.readlink()):
        path.unlink()
        path.symlink_to(hidden)


def _free(folder: Path, name: str) -> Path:
    """A path in the folder that nothing has: two names may differ in their secrets only."""
    path, number = folder / name, 1
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
    return path
