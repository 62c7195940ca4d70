"""Start an engine in a worker process, ask it with a time limit, and leave no process behind.

``worker`` is the other end. The two exchange JSON objects, one a line (see ``helpers.base.processes``).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from helpers.base.files import ROOT
from helpers.base.processes import ChildProcess
from helpers.engines.catalogue import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from helpers.base.processes import Message

_MESSAGE_CHARACTERS = 200
_SIGNALS = {"SIGKILL": "killed, as the system does where memory runs out (SIGKILL)"}


class WorkerEndedError(EngineError):
    """The worker's process is gone; the message says how it ended."""


class WorkerLateError(WorkerEndedError):
    """The worker timed out and was killed."""


class Child:
    """A worker's process, paused except between a request and its answer.

    The idle threads of an engine may spin, and would take CPU time from the engine that is measured.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.process = ChildProcess(command, environment=environment, cwd=ROOT, errors=log)
        self.log = log

    def send(self, request: Mapping[str, object]) -> None:
        """Wake the worker and send a request; ``receive`` waits for the answer. Raises WorkerEndedError."""
        self.process.resume()
        try:
            self.process.send(request)
        except OSError as error:
            raise WorkerEndedError(self._how_it_ended()) from error

    def receive(self, seconds: float) -> Message:
        """Return the answer and pause the worker.

        Raises EngineError if the answer is an error, WorkerEndedError if the worker is gone, WorkerLateError if it
        took longer than ``seconds``, after which it was killed.
        """
        try:
            answer = self.process.receive(seconds)
        except TimeoutError as error:
            self.end()
            raise WorkerLateError(f"ran over {seconds:.0f} s") from error
        except EOFError as error:
            raise WorkerEndedError(self._how_it_ended()) from error
        self.process.pause()
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def ask(self, request: Mapping[str, object], seconds: float) -> Message:
        """Send a request and return its answer, as ``send`` and ``receive`` do."""
        self.send(request)
        return self.receive(seconds)

    def end(self) -> None:
        """Kill the worker with all its descendants, and wait until it is gone."""
        self.process.end()

    def _how_it_ended(self) -> str:
        self.end()
        code = self.process.returncode
        assert code is not None
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended: {_SIGNALS.get(name, name)}"
        # a Python process writes its exception last
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        return f"its process ended with exit code {code}: {lines[-1][:_MESSAGE_CHARACTERS]}"
