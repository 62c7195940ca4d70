"""Signals that end a run: the first one lets it clean up, and further ones do not cut that short."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class _Stop:
    """Whether a signal came. Python drops an exception that a signal raises within a callback; this stays."""

    asked: bool = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.asked:
            raise KeyboardInterrupt


_open: list[_Stop] = []  # of the blocks that this process is in, the innermost last


@contextmanager
def interruptible() -> Iterator[_Stop]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that cleaning up runs.

    Further ones come to nothing until the block's end, so that nothing cuts the cleaning up short; nor do they in the
    blocks around it, but in a later block within those. A signal that was ignored before (by nohup, say) stays ignored.
    """
    stop = _Stop()
    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in stops if signal.getsignal(number) != signal.SIG_IGN}

    def interrupt(*_: object) -> None:
        # Not by SIG_IGN: of two signals at one moment, Python would complain about the second.
        if not stop.asked:
            for block in _open:
                block.asked = True
            raise KeyboardInterrupt

    _open.append(stop)
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _open.pop()
