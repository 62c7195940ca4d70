"""Texts that are no text: half characters, and contents that nobody can see."""

from __future__ import annotations

import unicodedata

# Unicode's Default_Ignorable_Code_Point, as far as the categories below do not have it, and the blank braille pattern.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0"
    + "".join(map(chr, range(0x180B, 0x1810)))
    + "".join(map(chr, range(0xFE00, 0xFE10)))
    + "".join(map(chr, range(0xFFF0, 0xFFF9)))
    + "".join(map(chr, range(0xE0000, 0xE1000)))
)
_BLANK_CATEGORIES = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})  # spaces, separators, controls, format characters


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
