"""Text from outside (outputs, values, names of files and models) made safe to print, and to paste into a shell."""

from __future__ import annotations

import json
import re
import shlex

# Control characters but for the line end and the tab, marks that change the direction of writing or are invisible, and
# half characters: a terminal would obey them, or show another text than stands there. Joiners stay, for emoji.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return the text with escape sequences and all that a terminal obeys written out, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(_written_out, text)


def one_line(text: str) -> str:
    """Return ``printable(text)`` with line ends and tabs written out too: no name begins a line of its own."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


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
