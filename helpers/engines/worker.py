"""One engine in a process of its own: ``python -m helpers.engines.worker NAME``.

Reads requests and writes answers, a JSON object a line. What libraries print goes to the standard error.

| request | answer |
|---|---|
| ``do`` "load", ``job`` | ``note``, ``versions`` |
| "case", ``prompts``, ``new_tokens`` | ``warm_up`` seconds, ``tokens``, ``cache_bytes``; the peak starts anew |
| "run", ``new_tokens`` | ``seconds`` |
| "peak" | ``bytes``, ``definition`` |

An answer with ``error`` names what went wrong; the worker goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

from helpers.engines import peak
from helpers.engines.catalogue import KINDS, Engine, EngineError, Ids, Job
from helpers.processes import Message, Parent, die_with_parent


class Worker:
    """Answers requests with one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts: Ids = []

    def answer(self, request: Message) -> dict[str, Any]:
        """The answer to one request; raises what the engine raises, EngineError for a run of the wrong length."""
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load, "case": self.case, "run": self.run, "peak": self.peak
        }  # fmt: skip
        return answers[request.pop("do")](**request)

    def load(self, job: Message) -> dict[str, Any]:
        """Load the model of a job."""
        return self.engine.load(Job(**job))

    def case(self, prompts: Ids, new_tokens: int) -> dict[str, Any]:
        """Warm up for a batch of prompts of one length: one whole run, whose tokens are told."""
        self.prompts = prompts
        start = perf_counter()
        self.engine.prepare(len(prompts), len(prompts[0]), new_tokens)
        tokens = self.engine.tokens(prompts, new_tokens)
        seconds = perf_counter() - start
        self._check([len(row) for row in tokens], new_tokens)
        found = {"warm_up": seconds, "tokens": tokens, "cache_bytes": self.engine.cache_bytes()}
        peak.reset()
        return found

    def run(self, new_tokens: int) -> dict[str, Any]:
        """One timed run."""
        start = perf_counter()
        counts = self.engine.run(self.prompts, new_tokens)
        seconds = perf_counter() - start
        self._check(counts, new_tokens)
        return {"seconds": seconds}

    def peak(self) -> dict[str, Any]:
        """The most memory held since the case began."""
        held, definition = peak.read()
        return {"bytes": held, "definition": definition}

    def _check(self, counts: list[int], new_tokens: int) -> None:
        if counts != [new_tokens] * len(self.prompts):
            raise EngineError(f"gave {counts} new tokens where {new_tokens} were asked for")


def serve(worker: Worker, parent: Parent) -> None:
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
    if type(error).__name__ == "OutOfMemoryError":
        return "ran out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def main() -> None:
    """Serve on the standard streams; what else is printed joins the standard error. Ends with its parent."""
    die_with_parent()
    serve(Worker(KINDS[sys.argv[1]].make()), Parent())


if __name__ == "__main__":
    main()
