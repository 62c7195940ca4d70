"""The process that started this one as a ``processes.ChildProcess``, as seen from here.

Only the standard library is needed: the worker of an engine imports this module under another Python.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from helpers.base.processes import Message

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Parent:
    """The process that started this one as a ``ChildProcess``, as seen from here.

    ``answers``: this process sends messages on its standard output. What else is printed, by a library say, then goes
    to the standard error.
    """

    def __init__(self, *, answers: bool = True) -> None:
        self._requests = os.fdopen(os.dup(0), "rb")
        self._answers: IO[str] | None = None
        if answers:
            self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
            os.dup2(2, 1)

    def __iter__(self) -> Iterator[Message]:
        """Yield the parent's messages until it closes the pipe or dies."""
        with suppress(EOFError):
            while True:
                yield self.receive()

    def receive(self) -> Message:
        """Wait for the parent's next message. Raises EOFError if it closed the pipe or died."""
        line = self._requests.readline()
        if not line:
            raise EOFError("The parent has closed the pipe.")
        message: Message = json.loads(line)
        return message

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message to the parent."""
        assert self._answers
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def end_with_it(self, mark: str = "", take: Callable[[Message], None] | None = None) -> None:
        """From now on, end this process when its input ends, after what carries the ``mark`` if one is given.

        For a parent that keeps the pipe open while it lives. A thread calls ``take`` with each message that it sends
        from now on.
        """
        threading.Thread(target=self._wait_for_end, args=(mark, take), daemon=True).start()

    def die_with_it(self) -> None:
        """On Linux, have the kernel kill this process when its parent dies, even while it is paused."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def _wait_for_end(self, mark: str, take: Callable[[Message], None] | None) -> None:
        # The descriptor itself, not the buffered file: a thread that holds the lock of a buffer when the interpreter
        # shuts down is a fatal error.
        rest = b""
        while part := os.read(self._requests.fileno(), 2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if take:
                    take(json.loads(line))
        if mark:
            # Only a child with a family of its own needs psutil.
            from helpers.base.families import _kill_marked

            _kill_marked(mark)
        os._exit(1)
