"""Run one engine in a process of its own: ``python -m helpers.engines.worker NAME``.

It reads requests and writes answers, one JSON object per line. What libraries print goes to the standard error.

| request | answer |
|---|---|
| ``do`` "load", ``job`` | ``note``, ``versions`` |
| "case", ``prompts``, ``new_tokens`` | ``warm_up`` seconds, ``tokens``, ``cache_bytes``; a new peak begins |
| "run", ``new_tokens`` | ``seconds`` |
| "peak" | ``bytes``, ``definition`` |

An answer with ``error`` says what went wrong, and the worker continues.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from helpers.base.parent import Parent
from helpers.engines.catalogue import KINDS, EngineError, Job
from helpers.engines.peak import _read_peak, _reset_peak

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.base.processes import Message
    from helpers.engines.catalogue import Ids, _Engine


class _Worker:
    """Answers requests with one engine."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.prompts: Ids = []

    def answer(self, request: Message) -> dict[str, Any]:
        """The answer to one request. Raises what the engine raises, and EngineError if a run has the wrong length."""
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load, "case": self.case, "run": self.run, "peak": self.peak
        }  # fmt: skip
        return answers[request.pop("do")](**request)

    def load(self, job: Message) -> dict[str, Any]:
        """Load the model of a job."""
        return asdict(self.engine.load(Job(**job)))

    def case(self, prompts: Ids, new_tokens: int) -> dict[str, Any]:
        """Warm up for a batch of prompts of one length: one whole run, whose tokens are part of the answer."""
        self.prompts = prompts
        start = perf_counter()
        self.engine.prepare(len(prompts), len(prompts[0]), new_tokens)
        tokens = self.engine.tokens(prompts, new_tokens)
        seconds = perf_counter() - start
        self._check([len(row) for row in tokens], new_tokens)
        cache_bytes = self.engine.cache_bytes()
        # the peak of a case leaves out what only compiling and warming up needed
        _reset_peak()
        return {"warm_up": seconds, "tokens": tokens, "cache_bytes": cache_bytes}

    def run(self, new_tokens: int) -> dict[str, Any]:
        """One timed run."""
        start = perf_counter()
        counts = self.engine.run(self.prompts, new_tokens)
        seconds = perf_counter() - start
        self._check(counts, new_tokens)
        return {"seconds": seconds}

    def peak(self) -> dict[str, Any]:
        """The peak of memory since the warm-up of the case (see ``helpers.engines.peak``)."""
        held, definition = _read_peak()
        return {"bytes": held, "definition": definition}

    def _check(self, counts: list[int], new_tokens: int) -> None:
        if counts != [new_tokens] * len(self.prompts):
            raise EngineError(f"gave {counts} new tokens where {new_tokens} were asked for")


def _serve(worker: _Worker, parent: Parent) -> None:
    """Answer until the requests end."""
    for request in parent:
        try:
            answer = worker.answer(request)
        except Exception as error:  # whatever an engine raises is the answer: the next case may fit it
            answer = {"error": _reason(error)}
        parent.send(answer)


def _reason(error: Exception) -> str:
    if isinstance(error, EngineError):
        return str(error)
    # by name, because torch may not be installed here
    if type(error).__name__ == "OutOfMemoryError":
        return "ran out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _main() -> None:
    """Serve on the standard streams; what else is printed joins the standard error. Ends with its parent."""
    parent = Parent()
    parent.die_with_it()
    _serve(_Worker(KINDS[sys.argv[1]].make()), parent)


if __name__ == "__main__":
    _main()
