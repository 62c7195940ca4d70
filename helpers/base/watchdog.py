"""A small process that ends this one's children when it is killed: ``python -m helpers.base.watchdog``.

A child notices by itself that its parent is gone, when its input ends. But whoever kills the parent may kill the child
at the same moment, and in a container, under systemd or in tmux nobody then ends what the child had started. The
watchdog is no child of its parent and is in no session with it, and waits for the end of a pipe. Only the parent holds
the other end. Through it come JSON lines:

    {"watch": mark, "known": [[pid, time of its start], ...]}       end these, and what carries the mark
    {"forget": mark}                                                that child has ended

Until it has something to end, it needs the standard library alone, and little memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from helpers.base.isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import psutil

# In the background of a shell that ends at once, so that the process is nobody's child. A shell would give it
# /dev/null as input, hence the detour through descriptor 3.
_DETACHED = 'exec 3<&0; "$@" <&3 3<&- >/dev/null 2>&1 &'


class _Watchdog:
    """This process's end of the pipe; the watchdog itself is started with the first child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: int | None = None
        self._told: dict[str, list[tuple[int, float]]] = {}
        # A forked process would hold the pipe open after this one's death.
        os.register_at_fork(after_in_child=self._leave)

    def watch(self, mark: str, known: Iterable[psutil.Process]) -> None:
        """End these processes, and what carries the mark, if this process dies."""
        ids = sorted(_identities(known))
        with self._lock:
            if self._told.get(mark) != ids:
                self._told[mark] = ids
                self._tell({"watch": mark, "known": ids})

    def forget(self, mark: str) -> None:
        """The child of this mark has ended, with all that it had started."""
        with self._lock:
            if self._told.pop(mark, None) is not None:
                self._tell({"forget": mark})

    def _tell(self, message: dict[str, object]) -> None:
        # Whatever is wrong with the watchdog must not stop the work.
        with suppress(OSError):
            try:
                self._send(message)
            except BrokenPipeError:
                # Somebody killed it: another one takes over.
                self._close()
                for mark, ids in self._told.items():
                    self._send({"watch": mark, "known": ids})

    def _send(self, message: dict[str, object]) -> None:
        if self._pipe is None:
            self._pipe = _start()
        os.write(self._pipe, json.dumps(message).encode() + b"\n")

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _leave(self) -> None:
        self._lock = threading.Lock()
        self._told = {}
        self._close()


def _identities(processes: Iterable[psutil.Process]) -> Iterator[tuple[int, float]]:
    from psutil import Error

    for process in processes:
        with suppress(Error):
            yield process.pid, process.create_time()


def _start() -> int:
    """Start the watchdog and return the end of the pipe that only this process holds."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "helpers.base.watchdog"]
    try:
        subprocess.run(
            ["/bin/sh", "-c", _DETACHED, "sh", *command],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=isolated(os.environ),
            cwd="/",
            start_new_session=True,
            check=False,
        )
    except OSError:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    # A stopped watchdog reads nothing, and must not stop this process with it.
    os.set_blocking(writer, False)
    return writer


def _main() -> None:
    """Take in what to watch until the parent is gone, then end what is left."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watched: dict[str, list[tuple[int, float]]] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "watch" in message:
            watched[message["watch"]] = message["known"]
        else:
            watched.pop(message["forget"], None)
    if watched:
        from helpers.base.families import _end_family

        for mark, known in watched.items():
            _end_family(mark, known)


if __name__ == "__main__":
    _main()
