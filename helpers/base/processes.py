"""Start child processes, talk to them, and end them with all their descendants (see ``families``).

A child starts in an environment that is ``isolated`` from the caller's, unless it is given one. If this process itself
is killed, the ``watchdog`` ends its children.

The parent uses ``ChildProcess``, or ``run`` for a command that only prints. The child uses ``parent.Parent``. They
exchange JSON objects, one a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, Self

import psutil

from helpers.base.clock import Clock
from helpers.base.families import _Family, _in_a_family, _kill, _new_mark
from helpers.base.isolation import isolated
from helpers.base.watchdog import _Watchdog

_SLICE_SECONDS = 0.25
_READER_SECONDS = 2
LineReader = Callable[[bytes], None]
Message = dict[str, Any]  # a JSON object that came from the other end
_watchdog = _Watchdog()


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
        if environment is None:
            environment = isolated(os.environ)
        self._process = _start(command, {**environment, self.mark: "1"}, cwd, errors, shares_output)
        self._errors = errors
        self._first: psutil.Process | None = None
        self._family = _Family({psutil.Process(self.pid)}, {self.pid})
        self._watch()
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

        Raises TimeoutError if none comes within ``seconds``, EOFError if it has closed its standard output. Time in
        which this process was stopped does not count. What is no message, such as a line that a start-up file of
        Python printed, goes where its errors go.
        """
        clock, left = Clock(), seconds
        while True:
            with suppress(Empty):
                line = self._messages.get(timeout=max(0.0, min(left, _SLICE_SECONDS)))
                if line is None:
                    raise EOFError("The process has closed its output.")
                if (message := _message(line)) is not None:
                    return message
                if callable(self._errors):
                    self._errors(line)
            left = seconds - clock.look()
            if left <= 0:
                raise TimeoutError(f"No message came within {seconds:g} s.")

    def wait(self, seconds: float | None = None) -> int:
        """Wait until it ends by itself and return its exit code.

        Raises TimeoutError after ``seconds``, in which time does not count while this process is stopped.
        """
        if seconds is None:
            return self._process.wait()
        clock, left = Clock(), seconds
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(max(0.0, min(left, _SLICE_SECONDS)))
            left = seconds - clock.look()
            if left <= 0:
                raise TimeoutError(f"The process did not end within {seconds:g} s.")

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
        total = self._family.look()
        self._watch()
        return total

    def is_stopped(self) -> bool:
        """True while somebody has stopped it, or the first process that it started, such as a kernel (SIGSTOP)."""
        with suppress(psutil.Error):
            own = psutil.Process(self.pid)
            if self._first is None or not self._first.is_running():
                self._first = min(own.children(), key=lambda child: child.create_time(), default=None)
            for process in (own, self._first):
                if process and process.status() == psutil.STATUS_STOPPED:
                    return True
        return False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block, it and its descendants are stopped; who was stopped before stays so."""
        stopped = self._family.stop()
        try:
            yield
        finally:
            for process in stopped:
                with suppress(psutil.Error):
                    process.resume()

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
        _watchdog.forget(self.mark)
        self.close_input()
        for stream, reader in self._readers:
            reader.join(timeout=_READER_SECONDS)
            if not reader.is_alive():  # else a process out of reach holds the other end, and closing would wait for it
                stream.close()
        return killed

    def _watch(self) -> None:
        # Who is in a family already is watched with it.
        if not _in_a_family():
            _watchdog.watch(self.mark, self._family.members)

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
    def last_line(self) -> str:
        """The last line of its output: the answer of a program that gives one, after what start-up files printed."""
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else ""

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


def _message(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _text(lines: Sequence[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "replace")
