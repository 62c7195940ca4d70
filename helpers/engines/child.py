"""The parent's end of a worker: start it, ask it with a time limit, let only one be awake, leave none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from helpers.engines.catalogue import EngineError
from helpers.types import ROOT

SIGNALS = {"SIGKILL": "killed, as the system does where memory runs out (SIGKILL)"}


class Ended(EngineError):
    """The worker's process is gone; the message says how."""


class Late(Ended):
    """It ran over its time, and was ended."""


class Child:
    """A worker's process. It sleeps (SIGSTOP) except between a request and its answer: an engine's idle threads may
    spin, and would take the processor from the engine that is measured."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        self.log = log
        self._answers: Queue[str] = Queue()
        Thread(target=self._read, daemon=True).start()

    def send(self, request: Mapping[str, Any]) -> None:
        """Wake it and ask; ``receive`` waits for the answer. Raises Ended."""
        assert self.process.stdin
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Ended(self._how_it_ended()) from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer; the worker sleeps afterwards. Raises EngineError, Ended where it is gone, Late where it took
        longer and was ended."""
        try:
            line = self._answers.get(timeout=seconds)
        except Empty as error:
            self.end()
            raise Late(f"ran over {seconds:.0f} s") from error
        if not line:
            raise Ended(self._how_it_ended())
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """``send`` and ``receive``."""
        self.send(request)
        return self.receive(seconds)

    def end(self) -> None:
        """Kill it with all its descendants, and wait until it is gone."""
        import psutil

        family: list[psutil.Process] = []
        with suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                stream.close()

    def _read(self) -> None:
        assert self.process.stdout
        with suppress(ValueError, OSError):  # closed by ``end``
            for line in self.process.stdout:
                self._answers.put(line)
        self._answers.put("")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            with suppress(OSError):
                os.killpg(self.process.pid, number)

    def _how_it_ended(self) -> str:
        self.end()
        code = self.process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended: {SIGNALS.get(name, name)}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}: {lines[-1][:200] if lines else 'no message'}"
