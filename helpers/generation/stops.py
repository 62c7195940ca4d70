"""Where the text of a reply ends: show it as it arrives, but nothing of a stop string, and no spaces around it.

A format names the strings that begin another speaker's turn (``ChatFormat.stop_strings``). A stop string may arrive in
several tokens, so an ending that may still become one is held back, and so are spaces that may be the last ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError

if TYPE_CHECKING:
    from collections.abc import Sequence


UNFINISHED = "\ufffd"  # decoders show this for bytes that are not a whole character yet


def _check_stop(stop: Sequence[str]) -> None:
    """Refuse a single text, which would be taken apart into letters, and an empty stop string, which is everywhere."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise WorkbookError(f"Give the stop strings as a list of texts, none of them empty, not {stop!r}.")


class _Edges:
    """Releases text as it arrives, but no broken character at its end, and with ``strip`` no white space around it."""

    def __init__(self, *, strip: bool) -> None:
        self.strip = strip
        self._begun, self._held = False, ""

    def feed(self, text: str) -> str:
        """Take the next piece of text; return the text that is known not to be the end."""
        text = self._held + text
        if self.strip and not self._begun:
            text = text.lstrip()
        end = len(text)
        while end and self._may_be_cut(text[end - 1]):
            end -= 1
        self._begun = self._begun or end > 0
        self._held = text[end:]
        return text[:end]

    def _may_be_cut(self, character: str) -> bool:
        return character == UNFINISHED or (self.strip and character.isspace())


class _StopFilter:
    """Releases text as it arrives, but holds back a stop string and any ending that may still become one.

    The stop string that is complete first counts, so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings = tuple(stop_strings)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Take the next piece of text; return the text that may be shown now, which is empty after a stop."""
        if self.stopped:
            return ""
        self._held += text
        start = self._first_stop()
        if start is None:
            return self._take(len(self._held) - self._possible_beginning())
        self.stopped = True
        return self._take(start)

    def flush(self) -> str:
        """The text held back, when no more can come; empty after a stop."""
        return "" if self.stopped else self._take(len(self._held))

    def _first_stop(self) -> int | None:
        """Where the stop string that is complete first begins; None if there is none."""
        first: tuple[int, int] | None = None
        for stop in self.stop_strings:
            start = self._held.find(stop)
            # of two that end at the same character the longer counts, which begins earlier
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = (start + len(stop), start)
        return None if first is None else first[1]

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _possible_beginning(self) -> int:
        """Length of the longest ending of the held text that begins a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            ending = self._held[-size:]
            if any(stop.startswith(ending) for stop in self.stop_strings):
                return size
        return 0
