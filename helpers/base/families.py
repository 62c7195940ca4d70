"""Who belongs to a child: its descendants and what carries its mark, even after their parents' deaths.

A process group does not hold a family together: Jupyter starts kernels in sessions of their own, and a notebook may
start further ones. Every child is therefore started with a *mark*, an environment variable that its descendants
inherit and are found by. A process that was given another environment carries no mark. It is found as a descendant,
by its session, or because it was seen as a descendant before its parent died.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_KILL_SECONDS = 10
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_MARK = "WORKBOOK_PROCESS_"


def _new_mark() -> str:
    return f"{_MARK}{uuid4().hex}"


def _in_a_family() -> bool:
    """True if this process carries a mark itself: whoever gave it ends what this process leaves behind."""
    return any(name.startswith(_MARK) for name in os.environ)


@contextmanager
def ending_descendants(mark: str) -> Iterator[None]:
    """At the end of the block, kill all processes but this one that carry the mark, and their descendants.

    On Linux this process also becomes the parent of its descendants whose own parent dies, so that they stay findable.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _kill_marked(mark)


@dataclass
class _Family:
    """Processes, their descendants, and who shares a session with one of them, even after their parents' deaths.

    New members are found only by ``look``; call it often. It must never hold a process of this process's session.
    """

    members: set[psutil.Process]
    sessions: set[int] = field(default_factory=set)

    def look(self) -> int:
        """Bring the family up to date and return the resident memory of its living members, in bytes."""
        self.members = self._living()
        self.sessions = set()
        total = 0
        for process in self.members:
            with suppress(psutil.Error, OSError):
                self.sessions.add(os.getsid(process.pid))
                total += process.memory_info().rss
        return total

    def stop(self) -> list[psutil.Process]:
        """Stop all members (SIGSTOP) and return those that were not stopped before."""
        stopped: list[psutil.Process] = []
        # Twice: while some are stopped, others may start new ones.
        for _ in range(2):
            self.look()
            for process in self.members:
                with suppress(psutil.Error):
                    if process.status() != psutil.STATUS_STOPPED:
                        process.suspend()
                        stopped.append(process)
        return stopped

    def _living(self) -> set[psutil.Process]:
        family: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                known = process in self.members or os.getsid(process.pid) in self.sessions
                if known and process not in family and not _dead(process):
                    family.update((process, *process.children(recursive=True)))
        return family


def _kill_marked(mark: str) -> int:
    """Kill all processes but this one that carry the mark, and their descendants; return how many.

    Gives up after ten seconds.
    """
    return _kill(mark, _Family(set()))


def _end_family(mark: str, known: Iterable[tuple[int, float]]) -> int:
    """Kill what carries the mark and the ``known`` processes (pid, time of start), with all descendants."""
    members = set()
    for pid, started in known:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            # A pid may belong to another process by now.
            if abs(process.create_time() - started) < 1:
                members.add(process)
    return _kill(mark, _Family(members))


def _kill(mark: str, family: _Family) -> int:
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_SECONDS
    # Again and again: while some are killed, others may start new ones.
    while (processes := _remaining(mark, family)) and time.monotonic() < deadline:
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(0.05)
    return len(killed)


def _remaining(mark: str, family: _Family) -> list[psutil.Process]:
    family.look()
    return [process for process in _marked(mark) | family.members if not _dead(process)]


def _marked(mark: str) -> set[psutil.Process]:
    """The processes that carry the mark, and all their descendants, without this process."""
    marked: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if mark in process.environ():
                marked.update((process, *process.children(recursive=True)))
    return {process for process in marked if process.pid != os.getpid()}


def _dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True
