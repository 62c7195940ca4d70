"""Start child processes, talk to them, and end them with all their descendants.

A process group does not hold a family together: Jupyter starts kernels in sessions of their own, and a notebook may
start further ones. Every child is therefore started with a *mark*, an environment variable that its descendants
inherit and are found by. A process that was given another environment carries no mark. It is found as a descendant,
by its session, or because it was seen as a descendant before its parent died.

The parent uses ``ChildProcess``, or ``run`` for a command that only prints. The child uses ``parent.Parent``. They
exchange JSON objects, one a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, Self
from uuid import uuid4

import psutil

_KILL_SECONDS = 10
_READER_SECONDS = 2
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
LineReader = Callable[[bytes], None]
Message = dict[str, Any]  # a JSON object that came from the other end


class ChildProcess:
    """A child process in a session of its own, with a mark that its descendants inherit.

    Its standard input stays open until ``close_input`` or ``end``, so that the child notices when this process dies.
    A thread calls ``output`` with each line of its standard output. Without ``output`` the lines are the messages of
    ``receive``, or, with ``shares_output``, they go where this process's own output goes. A thread calls ``errors``
    with each line of its standard error. ``errors`` may also be a file, which is appended to. Without it, the child
    shares this process's standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        output: LineReader | None = None,
        errors: LineReader | Path | None = None,
        shares_output: bool = False,
    ) -> None:
        self.mark = _new_mark()
        self._messages: Queue[bytes | None] = Queue()
        self._readers: list[tuple[IO[bytes], threading.Thread]] = []
        self._ended = False
        inherited = os.environ if environment is None else environment
        self._process = _start(command, {**inherited, self.mark: "1"}, cwd, errors, shares_output)
        self._family = _Family({psutil.Process(self.pid)}, {self.pid})
        if self._process.stdout:
            self._read(self._process.stdout, output or self._messages.put)
        if self._process.stderr and callable(errors):
            self._read(self._process.stderr, errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session and of its process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, the negative number of the signal that killed it, or None while it runs."""
        return self._process.poll()

    def send(self, message: Mapping[str, object]) -> None:
        """Write a message to its standard input. Raises BrokenPipeError if it no longer reads."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> Message:
        """Return its next message.

        Raises TimeoutError if none comes within ``seconds``, EOFError if it has closed its standard output.
        """
        try:
            line = self._messages.get(timeout=seconds)
        except Empty as error:
            raise TimeoutError(f"No message came within {seconds:g} s.") from error
        if line is None:
            raise EOFError("The process has closed its output.")
        message: Message = json.loads(line)
        return message

    def wait(self, seconds: float | None = None) -> int:
        """Wait until it ends by itself and return its exit code. Raises TimeoutError after ``seconds``."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"The process did not end within {seconds:g} s.") from error

    def pause(self) -> None:
        """Stop it with its process group (SIGSTOP) until ``resume``; nothing happens if it has ended."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after ``pause``."""
        self._signal(signal.SIGCONT)

    def resident_bytes(self) -> int:
        """Return the resident memory of the child and its living descendants, in bytes.

        Call it often: a descendant without the mark is known only once it has been seen here.
        """
        return self._family.look()

    def open_files(self) -> list[str]:
        """Return the paths of the files that the child holds open; none if it has ended."""
        with suppress(psutil.Error):
            return [file.path for file in psutil.Process(self.pid).open_files()]
        return []

    def close_input(self) -> None:
        """Close its standard input."""
        assert self._process.stdin
        with suppress(OSError):  # the child may be gone with a message unread
            self._process.stdin.close()

    def end(self) -> int:
        """Kill it with all its descendants, wait until they are gone, and return how many were killed."""
        if self._ended:
            return 0
        # Before the child is waited for, while its orphans are still its own and its pid cannot belong to another.
        killed = _kill(self.mark, self._family)
        self._process.kill()
        self._process.wait()
        self._ended = True
        self.close_input()
        for stream, reader in self._readers:
            reader.join(timeout=_READER_SECONDS)
            if not reader.is_alive():  # else a process out of reach holds the other end, and closing would wait for it
                stream.close()
        return killed

    def _read(self, stream: IO[bytes], take: LineReader) -> None:
        reader = threading.Thread(target=self._forward, args=(stream, take), daemon=True)
        self._readers.append((stream, reader))
        reader.start()

    def _forward(self, stream: IO[bytes], take: LineReader) -> None:
        for line in stream:
            take(line)
        if stream is self._process.stdout:
            self._messages.put(None)

    def _signal(self, number: signal.Signals) -> None:
        # A pid that was waited for may already belong to another process: poll first.
        if self.returncode is None:
            with suppress(OSError):
                os.killpg(self.pid, number)


@dataclass(frozen=True)
class _Completed:
    """How a command ended: its exit code, and what it wrote."""

    returncode: int
    output: str
    errors: str

    @property
    def last_words(self) -> str:
        """The last line of its standard error, which in Python is the exception; its exit code if there is none."""
        lines = self.errors.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.returncode}"


class Command:
    """A command that runs while this process does something else, and leaves no process behind."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._output: list[bytes] = []
        self._errors: list[bytes] = []
        self._child = ChildProcess(
            command, environment=environment, output=self._output.append, errors=self._errors.append
        )
        self._child.close_input()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.end()

    def result(self, seconds: float | None = None) -> _Completed:
        """Wait for its end. Raises TimeoutError if it takes longer than ``seconds``."""
        code = self._child.wait(seconds)
        self._child.end()
        return _Completed(code, _text(self._output), _text(self._errors))


def run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, seconds: float | None = None
) -> _Completed:
    """Run a command to its end with its output collected. Raises TimeoutError, as ``Command.result`` does."""
    with Command(command, environment) as running:
        return running.result(seconds)


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


def _new_mark() -> str:
    return f"WORKBOOK_PROCESS_{uuid4().hex}"


def _start(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | str | None,
    errors: LineReader | Path | None,
    shares_output: bool,
) -> subprocess.Popen[bytes]:
    stdout = None if shares_output else subprocess.PIPE

    def popen(stderr: int | IO[bytes] | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )

    if isinstance(errors, Path):
        with errors.open("ab") as file:
            return popen(file)
    return popen(subprocess.PIPE if errors else None)


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


def _text(lines: Sequence[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "replace")
