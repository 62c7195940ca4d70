"""Find, measure and kill the processes of one notebook.

Jupyter starts kernels in sessions of their own and a notebook may start further ones, so a process group is not
enough: every process of a notebook inherits an environment variable, its mark, and is found by it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from uuid import uuid4

import psutil

KILL_SECONDS = 10


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


def kill_marked(mark: str) -> int:
    """Kill what carries the mark until nothing does; the number of processes killed. Gives up after ten seconds."""
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while (processes := marked(mark)) and time.monotonic() < deadline:
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(0.05)
    return len(killed)


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes; 0 when it is gone."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
