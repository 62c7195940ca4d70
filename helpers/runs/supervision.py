"""Run one notebook in a child process, follow its events, and leave no process behind, however it ends."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Self, cast

import psutil

from helpers.base.processes import ChildProcess
from helpers.runs.redaction import _redact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from helpers.runs.child import _Event, _Job

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.25
MEMORY_SECONDS = 1.0
EXIT_SECONDS = 5.0


@dataclass
class _Progress:
    """How far a notebook is. ``reason`` says why it failed; ``ended`` is True once the child said how it ended.

    peak_bytes: the most resident memory of the notebook's processes together (``helpers.engines.peak`` defines the
    kinds of peak memory in this project); tree_bytes: the same with the runner's.
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

    def take(self, event: _Event) -> None:
        """Bring the progress up to date with one event of the child."""
        self.cells = event.get("cells", self.cells)
        self.cell = event.get("cell", self.cell)
        self.line = event.get("line", self.line)
        if event["event"] in ("started", "finished"):
            self.cell_began = monotonic() if event["event"] == "started" else None
        if event["event"] == "end":
            self.ended, self.reason = True, event["reason"]

    def overdue(self, job: _Job) -> str | None:
        """Why the child must be killed: it did not stop by itself, well after its time had run out."""
        if self.seconds > job.seconds + GRACE_SECONDS:
            return f"notebook ran past its {job.seconds:g} s budget at cell {self.cell}"
        if self.cell_began is not None and monotonic() - self.cell_began > job.cell_seconds + GRACE_SECONDS:
            return f"cell {self.cell} ran past its {job.cell_seconds:g} s budget"
        return None


def _supervise(job: _Job, environ: Mapping[str, str], log: Path, show: Callable[[_Progress], None]) -> _Progress:
    """Run the notebook to its end, calling ``show`` at least four times a second.

    Whatever happens, an exception in ``show`` or Ctrl-C included, no process of the notebook outlives this call.
    """
    progress, own = _Progress(monotonic()), psutil.Process()
    log.unlink(missing_ok=True)
    with (
        _Log(log, job.secrets) as written,
        ChildProcess(
            [sys.executable, "-m", "helpers.runs.child"],
            environment=environ,
            cwd=Path(job.notebook).parent,
            errors=written.write,
        ) as child,
    ):
        with suppress(BrokenPipeError):  # it died before it read its job: the end of its events tells
            child.send(asdict(replace(job, mark=child.mark)))
        _follow(child, job, progress, own, show)
        if progress.ended:
            with suppress(TimeoutError):
                child.wait(EXIT_SECONDS)
        elif progress.reason is None:
            progress.reason = f"its process ended unexpectedly (exit code {child.wait()}) at cell {progress.cell}"
    return progress


def _follow(
    child: ChildProcess, job: _Job, progress: _Progress, own: psutil.Process, show: Callable[[_Progress], None]
) -> None:
    """Take in the events until the child says how it ended, ran past its time, or is gone."""
    weighed = 0.0
    while True:
        moved = False
        with suppress(TimeoutError):
            try:
                progress.take(cast("_Event", child.receive(POLL_SECONDS)))
            except EOFError:
                return
            moved = True
        if progress.ended:
            return
        # Each event, too: a cell's memory may be gone a moment later.
        if moved or monotonic() - weighed > MEMORY_SECONDS:
            weighed = monotonic()
            progress.weigh(child.resident_bytes(), own.memory_info().rss)
        progress.reason = progress.overdue(job)
        if progress.reason:
            return
        show(progress)


class _Log:
    """What a notebook's process writes, line by line and without secrets, in a file that the first line makes."""

    def __init__(self, path: Path, secrets: tuple[str, ...]) -> None:
        self._path, self._secrets = path, secrets
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()

    def write(self, line: bytes) -> None:
        """Write one line; on a full disk it is lost, and the pipe is emptied all the same."""
        with suppress(OSError, ValueError):  # ValueError: a late line after the end
            if self._file is None:
                # Line by line, so that it can be read while the notebook runs; "x" follows no link.
                self._file = self._path.open("x", encoding="utf-8", buffering=1)
            self._file.write(_redact(line.decode("utf-8", "replace"), self._secrets))


def _environment(base: Mapping[str, str], offline: bool, workbook: Mapping[str, str]) -> dict[str, str]:
    """The environment of a notebook: the caller's, the run's own variables, and no hub where none is needed.

    MPLBACKEND is dropped, so that figures show in the notebook whatever the caller had set.
    """
    environ = {name: value for name, value in base.items() if name != "MPLBACKEND"}
    environ |= {f"WORKBOOK_{name}": value for name, value in workbook.items()} | {"WORKBOOK_UNATTENDED": "1"}
    if offline:
        environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environ
