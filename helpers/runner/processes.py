"""Find, measure and kill the processes of one notebook.

Jupyter starts kernels in sessions of their own and a notebook may start further ones, so a process group is not
enough: every process of a notebook inherits an environment variable, its mark, and is found by it. A process that was
given another environment carries no mark: it is found as a descendant, and, once its parent is gone, because it was
seen as one before.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

import psutil

KILL_SECONDS = 10
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass
class Family:
    """Processes, their descendants, and who shares a session with one of them, parents' deaths notwithstanding.

    Only ``look`` learns of new ones: call it often. Never start it with a process of one's own session.
    """

    members: set[psutil.Process]
    sessions: set[int] = field(default_factory=set)

    def look(self) -> int:
        """Bring the family up to date; the resident memory of its living members, in bytes."""
        family: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                known = process in self.members or os.getsid(process.pid) in self.sessions
                if known and process not in family and not _dead(process):
                    family.update((process, *process.children(recursive=True)))
        self.members, self.sessions, total = family, set(), 0
        for process in family:
            with suppress(psutil.Error, OSError):
                self.sessions.add(os.getsid(process.pid))
                total += process.memory_info().rss
        return total


def adopt_orphans() -> None:
    """On Linux, make this process the parent of its descendants whose own parent dies, so that they stay findable."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def new_mark() -> str:
    """The name of an environment variable that marks the processes of one notebook."""
    return f"WORKBOOK_PROCESS_{uuid4().hex}"


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark, and all their descendants; this process is not among them."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if mark in process.environ():
                found.update({one.pid: one for one in (process, *process.children(recursive=True))})
    return [process for pid, process in found.items() if pid != os.getpid() and not _dead(process)]


def kill_marked(mark: str, family: Family | None = None) -> int:
    """Kill what carries the mark, and the family, until nothing is left; the number of processes killed.

    Gives up after ten seconds.
    """
    killed: set[int] = set()
    family = family or Family(set())
    deadline = time.monotonic() + KILL_SECONDS
    while (processes := _left(mark, family)) and time.monotonic() < deadline:
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(0.05)
    return len(killed)


def _left(mark: str, family: Family) -> list[psutil.Process]:
    family.look()
    return [*marked(mark), *(process for process in family.members if not _dead(process))]


def _dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
