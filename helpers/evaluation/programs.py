"""Check a program that a model wrote, without giving it anything that it could damage.

Nothing of it is parsed or executed in this process. ``program_child`` does both, in a process of its own without
environment, files or time: only function definitions of a small part of Python, without imports, dunder names or any
built-in function that reaches the machine.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from helpers.base import processes

_CHILD = Path(__file__).with_name("program_child.py")
_SECONDS = 30  # of the clock, on a busy machine; the child also limits its own computing time
_MOST_CHARACTERS = 8_000  # escaped, still one argument of a command line


@functools.cache
def _passes_asserts(text: str, asserts: tuple[str, ...]) -> bool:
    """Whether the functions that a reply defines make every expression true."""
    # Escaped, a text holds no character that a command line cannot carry.
    job = json.dumps([text[:_MOST_CHARACTERS], asserts])
    # -I and -S: neither the folder, nor the user's packages, nor any start-up file.
    command = [sys.executable, "-I", "-S", str(_CHILD), job]
    try:
        # Without environment a program could not even read a token from it.
        return processes.run(command, environment={}, seconds=_SECONDS).returncode == 0
    except TimeoutError:
        return False
