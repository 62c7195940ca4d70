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


@contextmanager
def interruptible() -> Iterator[_Stop]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that cleaning up runs.

    Further ones are ignored to the block's end, so that nothing cuts the cleaning up short. A signal that was ignored
    before (by nohup, say) stays ignored.
    """
    stop = _Stop()
    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in stops if signal.getsignal(number) != signal.SIG_IGN}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        stop.asked = True
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
