"""Run one notebook in a child process, follow its events, and leave no process behind, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from time import monotonic
from typing import IO, Any

import psutil

from helpers.runner.processes import Family, kill_marked
from helpers.runner.redaction import redact

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.25
MEMORY_SECONDS = 1.0
EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What a child needs to know. ``secrets`` are blanked wherever the notebook's outputs hold them."""

    notebook: str
    output: str
    parameters: dict[str, Any]
    seconds: float
    cell_seconds: float
    secrets: tuple[str, ...]
    mark: str


@dataclass
class Progress:
    """How far a notebook is. ``reason`` says why it failed; ``ended`` is True once the child said how it ended.

    peak_bytes: the most resident memory of the notebook's processes together; tree_bytes: the same with the runner's.
    """

    began: float
    cell_began: float | None = None
    cell: int = 0
    cells: int = 0
    line: str = ""
    ended: bool = False
    reason: str | None = None
    peak_bytes: int = 0
    tree_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Seconds since the child was started."""
        return monotonic() - self.began

    def weigh(self, family_bytes: int, own_bytes: int) -> None:
        """Take in one sample of resident memory: of the notebook's processes, and of the runner's own."""
        self.peak_bytes = max(self.peak_bytes, family_bytes)
        self.tree_bytes = max(self.tree_bytes, family_bytes + own_bytes)

    def take(self, event: Mapping[str, Any]) -> None:
        """Bring the progress up to date with one event of the child."""
        self.cells = event.get("cells", self.cells)
        self.cell = event.get("cell", self.cell)
        self.line = event.get("line", self.line)
        if event["event"] in ("started", "finished"):
            self.cell_began = monotonic() if event["event"] == "started" else None
        if event["event"] == "end":
            self.ended, self.reason = True, event["reason"]

    def overdue(self, job: Job) -> str | None:
        """Why the child must be killed: it did not stop by itself, well after its time had run out."""
        if self.seconds > job.seconds + GRACE_SECONDS:
            return f"notebook ran past its {job.seconds:g} s budget at cell {self.cell}"
        if self.cell_began is not None and monotonic() - self.cell_began > job.cell_seconds + GRACE_SECONDS:
            return f"cell {self.cell} ran past its {job.cell_seconds:g} s budget"
        return None


def supervise(job: Job, environ: Mapping[str, str], log: Path, show: Callable[[Progress], None]) -> Progress:
    """Run the notebook to its end, calling ``show`` at least four times a second.

    Whatever happens, an exception in ``show`` or Ctrl-C included, no process of the notebook outlives this call.
    """
    progress, own = Progress(monotonic()), psutil.Process()
    with _child(job, environ, log) as (child, events, family):
        sampled = 0.0
        while (event := _next(events)) is not None:
            if event:
                progress.take(event)
            if progress.ended:
                break
            if event or monotonic() - sampled > MEMORY_SECONDS:
                sampled = monotonic()
                progress.weigh(family.look(), own.memory_info().rss)
            progress.reason = progress.overdue(job)
            if progress.reason:
                break
            show(progress)
        if progress.ended:
            with suppress(subprocess.TimeoutExpired):
                child.wait(EXIT_SECONDS)
        elif progress.reason is None:
            progress.reason = f"its process ended unexpectedly (exit code {child.wait()}) at cell {progress.cell}"
    return progress


@contextmanager
def _child(
    job: Job, environ: Mapping[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Queue[dict[str, Any] | None], Family]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "helpers.runner.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environ, job.mark: "1"},
        cwd=os.path.dirname(job.notebook),
        start_new_session=True,
    )
    family = Family({psutil.Process(child.pid)})
    events: Queue[dict[str, Any] | None] = Queue()
    readers = {
        child.stdout: threading.Thread(target=_forward, args=(child.stdout, events), daemon=True),
        child.stderr: threading.Thread(target=_write_log, args=(child.stderr, log, job.secrets), daemon=True),
    }
    try:
        for reader in readers.values():
            reader.start()
        with suppress(BrokenPipeError):  # it died before it read its job: the end of its events tells
            child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            child.stdin.flush()
        yield child, events, family
    finally:
        kill_marked(job.mark, family)  # first, while orphans are still the child's
        child.kill()
        child.wait()
        with suppress(BrokenPipeError):
            child.stdin.close()
        for stream, reader in readers.items():
            reader.join(timeout=2)
            if not reader.is_alive():  # else somebody still holds the other end, and closing would wait for them
                stream.close()


def _next(events: Queue[dict[str, Any] | None]) -> dict[str, Any] | None:
    try:
        return events.get(timeout=POLL_SECONDS)
    except Empty:
        return {}


def _forward(stream: IO[bytes], events: Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        events.put(json.loads(line))
    events.put(None)


def _write_log(stream: IO[bytes], log: Path, secrets: tuple[str, ...]) -> None:
    log.unlink(missing_ok=True)
    for line in stream:
        with suppress(OSError), log.open("a", encoding="utf-8") as file:  # on a full disk, go on emptying the pipe
            file.write(redact(line.decode("utf-8", "replace"), secrets))


def environment(base: Mapping[str, str], offline: bool, workbook: Mapping[str, str]) -> dict[str, str]:
    """The environment of a notebook: the caller's, the run's own variables, and no hub where none is needed.

    MPLBACKEND is dropped, so that figures show in the notebook whatever the caller had set.
    """
    environ = {name: value for name, value in base.items() if name != "MPLBACKEND"}
    environ |= {f"WORKBOOK_{name}": value for name, value in workbook.items()} | {"WORKBOOK_UNATTENDED": "1"}
    if offline:
        environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environ
