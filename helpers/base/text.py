"""Text from outside made safe to print and to paste; half characters, and contents that nobody can see."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata

# Control characters but for the line end and the tab, marks that change the direction of writing or are invisible, and
# half characters: a terminal would obey them, or show another text than stands there. Joiners stay, for emoji.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# Of these, what no page shows, or what makes it show another text than stands there.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Unicode's Default_Ignorable_Code_Point, as far as the categories below do not have it, and the blank braille pattern.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0"
    + "".join(map(chr, range(0x180B, 0x1810)))
    + "".join(map(chr, range(0xFE00, 0xFE10)))
    + "".join(map(chr, range(0xFFF0, 0xFFF9)))
    + "".join(map(chr, range(0xE0000, 0xE1000)))
)
_BLANK_CATEGORIES = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})  # spaces, separators, controls, format characters


def printable(text: str) -> str:
    """Return the text with escape sequences and all that a terminal obeys written out, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(_written_out, text)


def one_line(text: str) -> str:
    """Return ``printable(text)`` with line ends and tabs written out too: no name begins a line of its own."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def visible(page: str) -> str:
    """Return the text of a page with control characters, and marks that turn the direction of writing, written out."""
    return _UNSEEN.sub(_written_out, page)


def shortened(text: str, most: int) -> str:
    """Return the text, cut after ``most`` characters with a note of how many follow."""
    if len(text) <= most:
        return text
    return f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"


def shell_word(text: object) -> str:
    """Return the text quoted as one word of a shell, for a command that a person is to paste."""
    word = str(text)
    if one_line(word) == word:
        return shlex.quote(word)
    # bash and zsh read escapes in this form; between plain quotes they would reach the terminal.
    inner = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{one_line(inner)}'"


def _written_out(match: re.Match[str]) -> str:
    # From 0x7f on as JSON would write it, which knows no \\x: JSON stays JSON.
    if ord(match.group()) < 0x7F:
        return repr(match.group())[1:-1]
    return json.dumps(match.group())[1:-1] if match.group() != "\x7f" else "\\u007f"


def well_formed(text: str) -> bool:
    """True if a text can be written as UTF-8: no half of a surrogate pair stands alone in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_blank(text: str) -> bool:
    """True if nothing of a text can be seen: it is empty, or all spaces, zero-width and other invisible characters."""
    return all(map(_is_invisible, text))


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _BLANK_CATEGORIES or character in _INVISIBLE
