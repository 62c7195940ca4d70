"""Look for processes, and wait for what they do: for the tests of processes, single ones and whole runs."""

import time

import psutil


def processes_with(text):
    """The live processes that have a text in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(text in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds=60):
    """Wait until a condition holds; an AssertionError if it does not in that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
