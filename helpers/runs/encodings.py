"""Secrets that are written otherwise: in base64, hexadecimal, percent, \\u and HTML codes, and in the bytes of files.

Whose token it is need not be known: what is decoded has the form of one by no chance, because it has 34 letters and
digits after its prefix. Every search begins with a hint and costs linear time.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import struct
import zlib
from typing import TYPE_CHECKING

from helpers.runs.secrecy import REDACTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# In a binary file the next character may belong to something else: only tokens of one length. Letters of text in
# UTF-16 and UTF-32, as numpy keeps it, are zero bytes apart.
_TOKENS_OF_A_LENGTH = (
    rb"hf[_-][A-Za-z0-9]{34}",
    rb"hf%5[Ff][A-Za-z0-9]{34}",
    rb"h\0f\0_(?:\0[A-Za-z0-9]){34}",
    rb"h\0{3}f\0{3}_(?:\0{3}[A-Za-z0-9]){34}",
    rb"gh[pousr]_[A-Za-z0-9]{36}",
    rb"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    rb"glpat-[\w-]{20}",
    rb"A(?:KI|SI)A[A-Z0-9]{16}",
    rb"AIza[\w-]{35}",
    rb"npm_[A-Za-z0-9]{36}",
)
_SHORTEST_IN_BINARY = 8
_PLAIN = re.compile(r"hf[_-][A-Za-z0-9]{34}|gh[pousr]_[A-Za-z0-9]{36}")
# A prefix in base64 begins at one of three places in a group of four characters; what it takes to decode each.
_BASE64 = re.compile(
    r"(?:(?P<first>aGZf)|(?P<second>[GWm2]hmX)|(?P<third>oZl[89]))(?:(?:\\n|\r?\n)?[A-Za-z0-9+/_-]){44,88}={0,2}"
)
_MISSING = {"first": "", "second": "A", "third": "AAB"}
_BYTES_OF_A_TOKEN = re.compile(rb"[\x00-\xff]{0,2}hf_[A-Za-z0-9]{30,64}")
_HEX = re.compile(
    r"68[ :]?66[ :]?5[fF](?:[ :]?(?:3[0-9]|4[1-9a-fA-F]|5[0-9aA]|6[1-9a-fA-F]|7[0-9aA])){34}(?![0-9a-fA-F])"
)
# A word in which some letters are written as codes: what tells that there are some, the word, and its decoder. A word
# is searched for from its beginning only, and its parts are bounded, or a long line would cost its square.
_CODED: tuple[tuple[re.Pattern[str], re.Pattern[str], Callable[[str], str]], ...] = (
    (
        re.compile(r"%[2-7]"),
        re.compile(r"(?<![\w.~-])[\w.~-]{0,400}+(?:%[0-9A-Fa-f]{2}[\w.~-]{0,400}+)++"),
        lambda word: re.sub(r"%([0-9A-Fa-f]{2})", _character, word),
    ),
    (
        re.compile(r"\\(?:u00|x)[2-7]"),
        re.compile(r"(?<![\w\\-])[\w.~-]{0,400}+(?:\\{1,4}(?:u00|x)[0-9A-Fa-f]{2}[\w.~-]{0,400}+)++"),
        lambda word: re.sub(r"\\{1,4}(?:u00|x)([0-9A-Fa-f]{2})", _character, word),
    ),
    (
        re.compile(r"&(?:#|lowbar;)"),
        re.compile(r"(?<![\w;.~-])[\w.~-]{0,400}+(?:&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|lowbar);[\w.~-]{0,400}+)++"),
        html.unescape,
    ),
    (
        re.compile(r"\\_"),  # as Markdown and TeX write it
        re.compile(r"(?<![\w\\.~-])[\w.~-]{0,400}+(?:\\{1,2}_[\w.~-]{0,400}+)++"),
        lambda word: word.replace("\\", ""),
    ),
)
_HINT = re.compile(r"aGZf|[GWm2]hmX|oZl[89]|68[ :]?66[ :]?5[fF]|%[2-7]|\\u00|\\x|\\_|&#|&lowbar;")
PNG = b"\x89PNG\r\n\x1a\n"


def _without_encoded(text: str, secrets: Iterable[str]) -> str:
    """The text without tokens and ``secrets`` that are written in codes."""
    if not _HINT.search(text):
        return text
    text = _BASE64.sub(_without_base64, text)
    text = _HEX.sub(REDACTED, text)
    for hint, word, decode in _CODED:
        if hint.search(text):
            text = word.sub(lambda match, decode=decode: _shown(match.group(), decode, secrets), text)  # type: ignore[misc]
    return text


def _in_binary(secrets: Iterable[str]) -> re.Pattern[bytes]:
    """What no binary file may hold: tokens, and ``secrets``, which must stand nowhere by chance."""
    literal: list[bytes] = []
    for secret in secrets:
        if len(secret) >= _SHORTEST_IN_BINARY:
            literal += [secret.encode("utf-8", "surrogatepass")]
            wide = (secret.encode(encoding, "surrogatepass").rstrip(b"\0") for encoding in ("utf-16-le", "utf-32-le"))
            literal += wide
    return re.compile(b"|".join([*map(re.escape, literal), *_TOKENS_OF_A_LENGTH]))


def _clean_bytes(content: bytes, pattern: re.Pattern[bytes]) -> bytes | None:
    """The content of a file with asterisks in the place of secrets, of equal length, or None: nothing to change."""
    if content.startswith(PNG):
        try:
            return _clean_png(content, pattern)
        except struct.error:  # it is bytes as any other
            pass
    return pattern.sub(_asterisks, content) if pattern.search(content) else None


def _asterisks(match: re.Match[bytes]) -> bytes:
    # Of equal length, so that offsets inside the file, as in a SQLite file, still fit.
    return bytes(byte and ord("*") for byte in match.group())


def _clean_picture(data: str, pattern: re.Pattern[bytes]) -> str:
    """A picture in base64, without the secrets that stand in it as text, such as a title in a PNG."""
    try:
        cleaned = _clean_bytes(base64.b64decode(data), pattern)
    except binascii.Error:
        return data
    return data if cleaned is None else base64.b64encode(cleaned).decode()


def _clean_png(content: bytes, pattern: re.Pattern[bytes]) -> bytes | None:
    """A PNG whose text holds no secret; its pixels stay as they are. None: nothing to change."""
    parts, place, changed = [PNG], len(PNG), False
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        place += 12 + length
        cleaned = data if kind == b"IDAT" else pattern.sub(_asterisks, data)
        changed = changed or cleaned != data
        check = zlib.crc32(kind + cleaned)
        parts.append(struct.pack(">I", len(cleaned)) + kind + cleaned + struct.pack(">I", check))
    return b"".join(parts) if changed else None


def _without_base64(match: re.Match[str]) -> str:
    letters = re.sub(r"\\n|[\s=]", "", match.group()).replace("-", "+").replace("_", "/")
    encoded = _MISSING[str(match.lastgroup)] + letters
    decoded = base64.b64decode(encoded[: len(encoded) // 4 * 4])
    return REDACTED if _BYTES_OF_A_TOKEN.match(decoded) else match.group()


def _shown(word: str, decode: Callable[[str], str], secrets: Iterable[str]) -> str:
    decoded = decode(word)
    hidden = _PLAIN.search(decoded) or any(secret in decoded for secret in secrets)
    return REDACTED if hidden else word


def _character(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))
