"""Keep secrets out of texts and of JSON-like data: tokens and passwords read ``[redacted]``.

``secrecy`` says what a secret is. Known secrets are hidden in every way of writing them (JSON, HTML, an address,
base64); a token of a well-known form, a password in an address or a header, and a private key are hidden even if nobody
knows whose they are. Numbers and structure are never touched. ``sweeping`` does the same to the files of a folder.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard, overload
from urllib.parse import quote, quote_plus

from helpers.runs.encodings import _clean_picture, _in_binary, _without_encoded
from helpers.runs.secrecy import (
    _LONG_WORD,
    _NAMED,
    _TOKEN,
    REDACTED,
    _find_secrets,
    _is_token,
    _looks_secret,
)

_SHORTEST_HEAD = 10  # characters of a secret that was cut off
_ENCODED_FROM = 8  # characters: the base64 of fewer may stand in other data by chance
# What begins a form of _TOKEN or of _PLACES. To search for this first is faster than for all of them.
_HINT = re.compile(
    r"hf[_-]|api_org_|gh[pousr]_|github_pat_|gl[a-z]{2,5}-|[srp]k[-_]|A[KSBC][IC]A|AIza|ya29|GOCSPX|xox[a-z]-|xapp-"
    r"|npm_|pypi-|SG\.|do[opr]_v1|dckr_|dapi|hv[sbr]\.|r8_|gsk_|xai-|nvapi-|pplx-|ATATT3|lsv2_|eyJ|://|[?&;]\w"
    r"|PRIVATE KEY|uthorization|UTHORIZATION|[Bb]earer|BEARER|-[Kk]ey|-KEY|-[Tt]oken|-TOKEN|password"
)
_EXACT = re.compile(r"hf_[A-Za-z0-9]{34}|gh[pousr]_[A-Za-z0-9]{36}")
# A table cuts a long cell, and what is left of a token is still most of it.
_CUT_TOKEN = re.compile(r"hf_[A-Za-z0-9]{7,64}(?=\.\.\.|…)")
_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_LONGEST_KEY = 20_000
# What follows the first line of a key whose last line was cut off.
_KEY_LINES = re.compile(r"(?:(?:\s|\\[nr])*+[A-Za-z0-9+/=]{16,}+)++")
_ADDRESS = re.compile(r"(://[^\s/?#:@\"'<>\\]{0,256}:)([^\s/?#\"'<>\\]{1,512})(?=@)")
_USER = re.compile(r"(://)([^\s/?#:@\"'<>\\]{20,256})(?=@)")
_LOGIN = re.compile(r"(\blogin\s{1,8}\S{1,128}\s{1,8}password\s{1,8})(\S{1,512})")
# A place where a secret stands: what to look for first, because the search itself is slow; the text before the secret
# and the secret; and what tells that it is one.
_PLACES: tuple[tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        re.compile(r"(?:oken|OKEN|ey|EY|assword|asswd|wd|WD|ecret|ECRET)="),  # codespell:ignore
        re.compile(
            r"([?&;](?:[\w-]{0,20}token|api[_-]?key|password|passwd|pwd|(?:client_)?secret)=)([^&\s\"'<>#\\]{6,4096})",
            re.I,
        ),
        _looks_secret,
    ),
    (
        re.compile(r"(?:ey|EY|ig|uth|ature|ential)="),
        re.compile(
            r"([?&;](?:key|sig|auth|[\w-]{0,20}signature|[\w-]{0,20}credential)=)([^&\s\"'<>#\\]{8,4096})", re.I
        ),
        functools.partial(_looks_secret, sure=False),
    ),
    (
        re.compile(r"uthorization|UTHORIZATION"),
        re.compile(r"(authorization[\"']?\s{0,4}[:=,]\s{0,4}b?[\"']?basic\s{1,4})([\w+/=-]{6,8192})", re.I),
        bool,
    ),
    (
        re.compile(r"uthorization|UTHORIZATION"),
        re.compile(
            r"(authorization[\"']?\s{0,4}[:=,]\s{0,4}b?[\"']?(?:bearer|token)\s{1,4})([\w.~+/=-]{6,8192})", re.I
        ),
        _looks_secret,
    ),
    (re.compile(r"earer|EARER"), re.compile(r"(\bbearer\s{1,4})([\w.~+/=-]{16,8192})", re.I), _looks_secret),
    (
        re.compile(r"-(?:[Kk]ey|KEY|[Tt]oken|TOKEN)"),
        re.compile(
            r"(\b(?:x-)?(?:api-key|auth-token|private-token)[\"']?\s{0,4}[:=]\s{0,4}[\"']?)([\w.~+/=-]{6,8192})", re.I
        ),
        _looks_secret,
    ),
)
# What stands for a password in an example or in code.
_PLACEHOLDER = re.compile(r"\[redacted\]|\{[^{}]*\}|\$\w+|\$\{\w+\}|\*+|%s|<[^<>]*>|\.\.\.|…")
# An escape sequence ends where the secret begins: \n, \x0a, \u000a, %0A or the colour of a terminal.
_ESCAPE_END = re.compile(r"(?:\\[nrtbf]|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|%[0-9a-fA-F]{2}|\[[\d;]{0,12}m)$")
# In base64 anything may stand by chance, and an image holds no text.
_IMAGE_DATA = re.compile(r"[A-Za-z0-9+/=\s]*")


@overload
def _redact(value: str, secrets: Iterable[str]) -> str: ...


@overload
def _redact(value: Mapping[str, object], secrets: Iterable[str]) -> dict[str, Any]: ...


@overload
def _redact(value: object, secrets: Iterable[str]) -> object: ...


def _redact(value: object, secrets: Iterable[str]) -> object:
    """Return a copy of JSON-like data (or a text) in which every occurrence of a secret reads ``[redacted]``.

    Numbers stay as they are. A key is changed only if it holds a token or a long secret, which no structure does.
    """
    return _cleaned(value, _hider(tuple(secrets)))


def for_screen(text: str) -> str:
    """Return a text without the secrets of this process's environment, for a message on the terminal."""
    return _redact(text, _own_secrets())


@functools.cache
def _own_secrets() -> tuple[str, ...]:
    return _find_secrets(os.environ)


class _Hider:
    """Hides certain secrets, and what has the form of one, in texts."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._long: list[str] = []
        self._whole: list[str] = []  # the long ones as they are, without their other forms
        self._short: list[str] = []
        self._named: list[tuple[str, re.Pattern[str]]] = []
        for secret in secrets:
            name, named, value = secret.partition(_NAMED)
            if named:
                self._named.append((name, _beside(name, value)))
            elif _is_long(secret):
                self._long.extend(_forms(secret))
                self._whole.append(secret)
            else:
                self._short.extend(_forms(secret))

    def certain(self, text: str) -> str:
        """The text without tokens and long secrets: nothing else has their form."""
        text = self._without_long(text)
        if _HINT.search(text):
            text = _TOKEN.sub(_hidden_token, text)
        return text

    def _without_long(self, text: str) -> str:
        for form in self._long:
            if form in text:
                text = text.replace(form, REDACTED)
        return text

    def everything(self, text: str) -> str:
        """The text without any secret."""
        text = self._without_long(text)
        for form in self._short:
            if form in text:
                text = _replace_words(text, form)
        for name, pattern in self._named:
            if name in text:
                text = pattern.sub(rf"\g<1>{REDACTED}", text)
        for secret in self._whole:
            if len(secret) >= _LONG_WORD and secret[:_SHORTEST_HEAD] in text:
                text = _without_heads(text, secret)
        if _HINT.search(text):
            text = _without_shapes(text)
        return _without_encoded(text, self._whole)

    @functools.cached_property
    def in_binary(self) -> re.Pattern[bytes]:
        """What no binary file may hold: long secrets, and tokens."""
        return _in_binary(self._long)


@functools.lru_cache(maxsize=8)
def _hider(secrets: tuple[str, ...]) -> _Hider:
    return _Hider(secrets)


def _cleaned(value: object, hider: _Hider) -> object:
    if isinstance(value, str):
        return hider.everything(value)
    if isinstance(value, Mapping):
        return _cleaned_mapping(value, hider)
    if isinstance(value, list | tuple):
        return [_cleaned(item, hider) for item in value]
    return value


def _cleaned_mapping(value: Mapping[str, object], hider: _Hider) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, item in value.items():
        shown, number = hider.certain(key), 1
        # Two keys that held secrets are still two.
        while shown in result:
            number += 1
            shown = f"{hider.certain(key)} {number}"
        result[shown] = _clean_picture(item, hider.in_binary) if _is_image(item, key) else _cleaned(item, hider)
    return result


def _is_image(value: object, key: str) -> TypeGuard[str]:
    is_type = key.startswith(("image/", "audio/", "video/", "application/pdf")) and not key.startswith("image/svg")
    return is_type and isinstance(value, str) and _IMAGE_DATA.fullmatch(value) is not None


def _is_long(secret: str) -> bool:
    """True for a secret that stands nowhere by chance, not even within a longer word."""
    return len(secret) >= _LONG_WORD or not secret.isalnum()


def _forms(secret: str) -> tuple[str, ...]:
    """The secret itself, and as JSON, HTML, a Python literal, an address, a file's name and base64 would write it."""
    addressed = quote(secret, safe="")
    forms = [secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)]
    forms += [forms[-1].replace("&quot;", "&#34;").replace("&#x27;", "&#39;")]  # as jinja writes it
    forms += [repr(secret)[1:-1], addressed, addressed.replace("%2F", "/"), quote_plus(secret)]
    forms += [re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), addressed)]
    if _is_long(secret):
        forms.append(re.sub(r"[^a-zA-Z0-9.-]+", "-", secret))
    if len(secret) >= _ENCODED_FROM:
        in_hex = secret.encode("utf-8", "surrogatepass").hex()
        forms += [in_hex, in_hex.upper(), *_base64_forms(secret)]
    return tuple(dict.fromkeys(form for form in forms if len(form) >= min(len(secret), _ENCODED_FROM)))


def _base64_forms(secret: str) -> Iterable[str]:
    """How base64 writes the secret within a longer text: it begins at one of three places in a group of four."""
    content = secret.encode("utf-8", "surrogatepass")
    for before in range(3):
        # Characters that also hold bits of what stands before or behind are left out.
        first, last = -(-before * 8 // 6), (before + len(content)) * 8 // 6
        encoded = base64.b64encode(b"\0" * before + content).decode()[first:last]
        yield from (encoded, encoded.replace("+", "-").replace("/", "_"))


def _beside(name: str, value: str) -> re.Pattern[str]:
    quotes = r"[\"']?"
    return re.compile(
        rf"(\b{re.escape(name)}{quotes}\]?\s{{0,4}}[:=,]\s{{0,4}}b?{quotes}){re.escape(value)}(?![A-Za-z0-9_])"
    )


def _without_heads(text: str, secret: str) -> str:
    """Hide the beginning of a secret where it was cut off."""

    def hidden(match: re.Match[str]) -> str:
        return REDACTED if secret.startswith(match.group()) else match.group()

    begun = rf"{re.escape(secret[:_SHORTEST_HEAD])}[^.…\s]{{0,{len(secret)}}}(?=\.\.\.|…)"
    return re.sub(begun, hidden, text)


def _replace_words(text: str, form: str) -> str:
    """Hide a short secret where it is a word of its own: not the digits of a number, not a part of a name."""

    def hidden(match: re.Match[str]) -> str:
        end = text[match.end() : match.end() + 1]
        alone = not (end.isalnum() or end == "_") and _begins_word(text, match.start())
        return REDACTED if alone else match.group()

    return re.sub(re.escape(form), hidden, text)


def _begins_word(text: str, start: int) -> bool:
    before = text[start - 1 : start]
    if not (before.isalnum() or before == "_"):
        return True
    return _ESCAPE_END.search(text[max(0, start - 16) : start]) is not None


def _without_shapes(text: str) -> str:
    """The text without what has the form of a secret, whoever's it is."""
    if "PRIVATE KEY" in text:
        text = _without_private_keys(text)
    text = _TOKEN.sub(_hidden_token, text)
    text = _CUT_TOKEN.sub(_hidden_token, text)
    if "://" in text:
        text = _ADDRESS.sub(_hidden_after(bool), text)
        text = _USER.sub(_hidden_after(lambda user: _looks_secret(user, sure=False)), text)
    if "password" in text:
        text = _LOGIN.sub(_hidden_after(bool), text)
    for hint, pattern, is_secret in _PLACES:
        if hint.search(text):
            text = pattern.sub(_hidden_after(is_secret), text)
    return text


def _hidden_token(match: re.Match[str]) -> str:
    # Within a longer word, as in base64, it is there by chance, but for a token of exactly this length.
    whole = _EXACT.fullmatch(match.group()) or _begins_token(match.string, match.start())
    if whole and _is_token(match.group()):
        return REDACTED
    return match.group()


def _begins_token(text: str, start: int) -> bool:
    # A name may stand before it, as in a file's name: run_hf_...
    return text[start - 1 : start] == "_" or _begins_word(text, start)


def _hidden_after(is_secret: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
    def hidden(match: re.Match[str]) -> str:
        secret = is_secret(match[2]) and not _PLACEHOLDER.fullmatch(match[2])
        return match[1] + REDACTED if secret else match.group()

    return hidden


def _without_private_keys(text: str) -> str:
    parts, done = [], 0
    for begin in _KEY_BEGIN.finditer(text):
        if begin.start() < done:
            continue
        end = _KEY_END.search(text, begin.end(), begin.end() + _LONGEST_KEY) or _KEY_LINES.match(text, begin.end())
        if end is None:  # somebody writes about keys
            continue
        parts += [text[done : begin.start()], REDACTED]
        done = end.end()
    return "".join([*parts, text[done:]])
