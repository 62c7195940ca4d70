"""The strict judge of the fault campaign: six ways to fail, and the questions that find them.

Each case does one real thing to the workbook (a broken file, a signal, a hostile text) and asks one of the functions
below. A ``Fault`` says what went wrong, and of which kind it is; any other exception counts as a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT

# lost: something that was there, or that had been computed, is gone. wrong: another value, status or advice than is
# right, or a refusal of what is valid. survivor: a process that outlives its run. leak: a secret in a file or on the
# screen. execution: what was only data ran as a program. traceback: an error that no sentence explains.
KINDS = ("lost", "wrong", "survivor", "leak", "execution", "traceback")

# The installed command may belong to another checkout than the one that is judged.
_CALL = "import sys; sys.argv[0] = 'workbook'; from helpers.cli import app; app()"


class Fault(AssertionError):
    """What the workbook did wrong, and of which kind it is."""

    def __init__(self, kind: str, what: str) -> None:
        assert kind in KINDS
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and all that it printed."""

    code: int
    screen: str

    def ends(self, code: int, *words: str) -> Outcome:
        """Judge the exit code, and that the screen holds these words and no traceback."""
        if "Traceback (most recent call last)" in self.screen:
            raise Fault("traceback", self.screen[-2000:])
        if self.code != code:
            raise Fault("wrong", f"exit code {self.code}, not {code}: {self.screen[-2000:]}")
        flat = " ".join(self.screen.split())
        for word in words:
            if word not in flat:
                raise Fault("wrong", f"{word!r} is not on the screen: {self.screen[-2000:]}")
        return self


def refused(call: Callable[[], object], *words: str, error: type[Exception] = WorkbookError) -> str:
    """Judge that a call raises the project's own error with these words in its message; return the message."""
    try:
        value = call()
    except error as refusal:
        message = str(refusal)
        for word in words:
            if word not in message:
                raise Fault("wrong", f"{word!r} is not in the message: {message}") from refusal
        return message
    except Exception as unexplained:
        raise Fault("traceback", f"{type(unexplained).__name__}: {unexplained}") from unexplained
    raise Fault("wrong", f"accepted, with {value!r}")


def same(value: object, right: object) -> None:
    """Judge that a value is the right one."""
    if value != right:
        raise Fault("wrong", f"{value!r} in place of {right!r}")


def kept(path: Path, content: bytes) -> None:
    """Judge that a file is there, and whole."""
    if not path.exists() or path.read_bytes() != content:
        raise Fault("lost", f"{path.name} is gone or changed")


def no_secret(secret: str, folder: Path, screen: str = "") -> None:
    """Judge that a secret stands in no file of a folder, in no file's name, and not on the screen."""
    if secret in screen:
        raise Fault("leak", "the secret is on the screen")
    for path in folder.rglob("*"):
        if secret in path.name:
            raise Fault("leak", f"the secret is in the name of a file of {path.parent}")
        if path.is_file() and secret.encode() in path.read_bytes():
            raise Fault("leak", f"the secret is in {path}")


def not_executed(canary: Path) -> None:
    """Judge that nobody made a file that only executed data would make."""
    if canary.exists():
        raise Fault("execution", f"{canary.name} was made")


def no_survivor(mark: str, seconds: float = 5) -> None:
    """Judge that no process has ``mark`` in its command line or environment, after a grace of some seconds."""
    end = time.monotonic() + seconds
    while survivors := list(_marked(mark)):
        if time.monotonic() > end:
            raise Fault("survivor", f"still alive: {survivors}")
        time.sleep(0.1)


def _marked(mark: str) -> Iterable[str]:
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(mark in text for text in told):
            yield f"{process.pid} {' '.join(process.cmdline()[:4])}"


def workbook(
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    folder: Path | None = None,
    root: Path = ROOT,
    seconds: float = 240,
) -> Outcome:
    """Run the ``workbook`` command of the checkout ``root`` in a process of its own, as a shell would."""
    full = {name: value for name, value in {**os.environ, **(environment or {})}.items() if name not in without}
    full["PYTHONPATH"] = str(root)
    command = [sys.executable, "-c", _CALL, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder or root,
        env=full,
        capture_output=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Outcome(done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace"))
