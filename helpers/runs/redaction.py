"""Keep secrets out of every file of a run: tokens and passwords in the environment and in parameters.

``_find_secrets`` says which values are secret, ``_redact`` blanks them in texts and JSON-like data, and ``_sweep`` in
the files of a folder, whoever wrote them.
"""

from __future__ import annotations

import html
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote, unquote

from helpers.base.files import write_json
from helpers.runs.schema import REDACTED

SHORTEST = 6
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|KEY|PASSWORD|PASSWD|(?<!^)(?<!^OLD)PWD|PASS|PASSPHRASE|CREDENTIAL|AUTH|PAT)S?\d*(_|$)", re.I
)
# Not as a part of a path: a folder may be called hf_downloads.
_SECRET_VALUE = re.compile(
    r"(?<![\w./-])(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|AIza|eyJ)[\w.-]{6,}(?![\w./-])"
)
_USER_INFO = re.compile(r"://([^/?#\s]*)@")
_JSON_SUFFIXES = {".json", ".ipynb"}


def _find_secrets(named: Mapping[str, object]) -> tuple[str, ...]:
    """Return the values among ``named`` (the environment, or parameters) that look like a token, longest first.

    A value counts when its name ends in or contains a word such as TOKEN, SECRET, KEY or PASSWORD. Of any value, what
    has the form of a well-known token (``hf_...``) counts, and the password inside an address, decoded too. Values
    under six characters and paths that exist do not count: blanking them everywhere would only spoil the files.
    """
    candidates: set[str] = set()
    for name, value in named.items():
        text = str(value)
        if _SECRET_NAME.search(name):
            candidates.add(text)
        candidates.update(match.group() for match in _SECRET_VALUE.finditer(text))
        candidates.update(_in_addresses(text))
    # The longest first: a secret that holds another one must be blanked whole.
    return tuple(sorted(filter(_worth_hiding, candidates), key=len, reverse=True))


@overload
def _redact(value: str, secrets: Iterable[str]) -> str: ...


@overload
def _redact(value: Mapping[str, object], secrets: Iterable[str]) -> dict[str, Any]: ...


@overload
def _redact(value: object, secrets: Iterable[str]) -> object: ...


def _redact(value: object, secrets: Iterable[str]) -> object:
    """Return a copy of JSON-like data (or a text) in which every occurrence of a secret reads ``[redacted]``."""
    secrets = tuple(secrets)
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {_redact(key, secrets): _redact(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    # A secret of digits alone may be stored as a number.
    if isinstance(value, int | float) and any(secret in str(value) for secret in secrets):
        return REDACTED
    return value


def _sweep(folder: Path, secrets: Iterable[str]) -> list[Path]:
    """Redact every file below ``folder`` that still holds a secret, and return the files that were changed.

    Binary files keep their length: a secret there is overwritten with asterisks.
    """
    secrets = tuple(secrets)
    if not secrets:
        return []
    forms: list[bytes] = []
    for secret in secrets:
        forms.extend(form.encode() for form in _forms(secret))
    changed = [path for path in sorted(folder.rglob("*")) if _holds_any(path, forms)]
    for path in changed:
        _clean(path, secrets, forms)
    return changed


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        for form in _forms(secret):
            text = text.replace(form, REDACTED)
    return text


def _forms(secret: str) -> tuple[str, ...]:
    """The secret itself, and as JSON, HTML, a Python literal and an address would write it."""
    forms = (secret, json.dumps(secret)[1:-1], html.escape(secret), repr(secret)[1:-1], quote(secret, safe=""))
    return tuple(dict.fromkeys(forms))


def _in_addresses(text: str) -> Iterator[str]:
    """The passwords of the addresses in a text, as they stand and decoded, and users' names that are tokens."""
    for match in _USER_INFO.finditer(text):
        user, _, password = match.group(1).partition(":")
        yield from (password, unquote(password))
        if _SECRET_VALUE.fullmatch(user):
            yield user


def _worth_hiding(text: str) -> bool:
    if len(text) < SHORTEST:
        return False
    try:
        return not (text.startswith("/") and Path(text).exists())
    except OSError:  # longer than any path, so it is none
        return True


def _holds_any(path: Path, forms: list[bytes]) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(form) >= 0 for form in forms)


def _clean(path: Path, secrets: tuple[str, ...], forms: list[bytes]) -> None:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        for form in forms:
            # Of equal length, so that offsets inside the file, as in a zip or a SQLite file, still fit.
            content = content.replace(form, b"*" * len(form))
        path.write_bytes(content)
        return
    if path.suffix in _JSON_SUFFIXES:
        with suppress(ValueError, RecursionError):  # a damaged file, or one that holds NaN, is text like any other
            write_json(path, _redact(json.loads(text), secrets))
            return
    path.write_text(_redact_text(text, secrets), encoding="utf-8")
