"""Run one notebook in a child process, follow its events, and leave no process behind, however it ends."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import IO, TYPE_CHECKING, Self, cast

import psutil

from helpers.base.clock import Clock
from helpers.base.installed import damage
from helpers.base.isolation import isolated
from helpers.base.processes import ChildProcess
from helpers.runs.redaction import _redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from helpers.runs.child import _Event, _Job

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.25
MEMORY_SECONDS = 1.0
EXIT_SECONDS = 5.0
LONGEST_STOP_SECONDS = 3600.0
_OF_A_RUN = ("EXPECTED", "NOTEBOOK", "PROFILE", "REHEARSAL", "REVISIONS", "RUN_DIR")


@dataclass
class _Progress:
    """How far a notebook is. ``reason`` says why it failed; ``ended`` is True once the child said how it ended.

    seconds: since the child was started, without those in which the run was stopped (Ctrl-Z, a paused container); nor
    those, up to an hour, in which only the notebook's process or its kernel was. peak_bytes: the most resident memory
    of the notebook's processes together (``helpers.engines.peak`` defines the kinds of peak memory in this project);
    tree_bytes: the same with the runner's.
    """

    seconds: float = 0.0
    stopped: float = 0.0
    cell_began: float | None = None
    cell: int = 0
    cells: int = 0
    line: str = ""
    ended: bool = False
    reason: str | None = None
    late: str | None = None
    late_since: float = 0.0
    peak_bytes: int = 0
    tree_bytes: int = 0

    def __post_init__(self) -> None:
        self._clock, self._counted = Clock(), 0.0

    def look(self, *, stopped: bool) -> None:
        """Take in the time that has passed; ``stopped``: the notebook's processes are."""
        before, self._counted = self._counted, self._clock.look()
        if stopped and self.stopped < LONGEST_STOP_SECONDS:
            self.stopped += self._counted - before
        self.seconds = self._counted - self.stopped

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
            self.cell_began = self.seconds if event["event"] == "started" else None
        if event["event"] == "end":
            self.ended, self.reason = True, event["reason"]

    def overdue(self, job: _Job) -> str | None:
        """Why the notebook must end: its time, or that of its cell, has run out."""
        if self.seconds > job.seconds:
            return f"notebook ran past its {job.seconds:g} s budget at cell {self.cell}"
        if self.cell_began is not None and self.seconds - self.cell_began > job.cell_seconds:
            return f"cell {self.cell} ran past its {job.cell_seconds:g} s budget"
        return None


def _supervise(job: _Job, environ: Mapping[str, str], log: Path, show: Callable[[_Progress], None]) -> _Progress:
    """Run the notebook to its end, calling ``show`` at least four times a second.

    Whatever happens, an exception in ``show`` or Ctrl-C included, no process of the notebook outlives this call.
    """
    log.unlink(missing_ok=True)
    with TemporaryDirectory(prefix="workbook-") as private:
        # Not the user's: there are start-up files, and the files of connections stay behind after a kill.
        own = {"IPYTHONDIR": private, "JUPYTER_RUNTIME_DIR": private}
        with (
            _Log(log, job.secrets) as written,
            ChildProcess(
                [sys.executable, "-m", "helpers.runs.child"],
                environment={**environ, **own},
                cwd=Path(job.notebook).parent,
                errors=written.write,
            ) as child,
        ):
            return _supervised(child, job, show)


def _supervised(child: ChildProcess, job: _Job, show: Callable[[_Progress], None]) -> _Progress:
    progress = _Progress()
    with suppress(BrokenPipeError):  # it died before it read its job: the end of its events tells
        child.send(asdict(replace(job, mark=child.mark)))
    with _job_control(child) as stop_if_asked:
        for _ in _following(child, job, progress):
            stop_if_asked()
            show(progress)
    if progress.ended:
        with suppress(TimeoutError):
            child.wait(EXIT_SECONDS)
    elif progress.reason is None:
        how = f"its process ended unexpectedly (exit code {child.wait()}) at cell {progress.cell}"
        progress.reason = f"{how}. {damage()}".removesuffix(". ")
    return progress


def _following(child: ChildProcess, job: _Job, progress: _Progress) -> Iterator[None]:
    """Take in the events until the child says how it ended, did not stop in time, or is gone; yield now and then."""
    weighed, own = 0.0, psutil.Process()
    while True:
        try:
            moved = _take_events(child, progress)
        except EOFError:
            return
        progress.look(stopped=child.is_stopped())
        if progress.ended:
            return
        # Each event, too: a cell's memory may be gone a moment later.
        if moved or monotonic() - weighed > MEMORY_SECONDS:
            weighed = monotonic()
            progress.weigh(child.resident_bytes(), own.memory_info().rss)
        _enforce(child, job, progress)
        if progress.reason:
            return
        yield


def _take_events(child: ChildProcess, progress: _Progress) -> bool:
    """Wait a moment for an event, and take in all that are here; False if none came.

    All, because after a stop of this process many may wait, and the last may say that the notebook is through.
    """
    moved, wait = False, POLL_SECONDS
    with suppress(TimeoutError):
        while not progress.ended:
            progress.take(cast("_Event", child.receive(wait)))
            moved, wait = True, 0.0
    return moved


def _enforce(child: ChildProcess, job: _Job, progress: _Progress) -> None:
    """Tell the child when the time has run out, and later, if it does not stop, set the reason to kill it."""
    if progress.late is None:
        progress.late = progress.overdue(job)
        progress.late_since = progress.seconds
        if progress.late and progress.cells:
            with suppress(BrokenPipeError):
                child.send({"late": progress.late})
    elif progress.seconds - progress.late_since > GRACE_SECONDS:
        progress.reason = progress.late


@contextmanager
def _job_control(child: ChildProcess) -> Iterator[Callable[[], None]]:
    """Within the block Ctrl-Z stops the child, too, which is in a session of its own, and fg lets both go on.

    Yields a function to call often: it stops both if that was asked for meanwhile.
    """
    asked = threading.Event()

    def stop_if_asked() -> None:
        if asked.is_set():
            asked.clear()
            with child.frozen():
                # As the system would have done, which stops nothing where no shell could let it go on.
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTSTP)
                signal.signal(signal.SIGTSTP, lambda *_: asked.set())

    # Python lets only the main thread set handlers, and a signal that was ignored before stays so.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        yield stop_if_asked
        return
    signal.signal(signal.SIGTSTP, lambda *_: asked.set())
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


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
    """The environment of a notebook: the run's own variables, no hub where none is needed, and what ``isolated`` keeps.

    MPLBACKEND is dropped, so that figures show in the notebook whatever the caller had set, and what another run,
    from whose notebook this one may be started, has set for itself.
    """
    dropped = {"MPLBACKEND", *(f"WORKBOOK_{name}" for name in _OF_A_RUN)}
    environ = {name: value for name, value in isolated(base).items() if name not in dropped}
    environ |= {f"WORKBOOK_{name}": value for name, value in workbook.items()} | {"WORKBOOK_UNATTENDED": "1"}
    if offline:
        environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environ


def _kept_out(base: Mapping[str, str]) -> list[str]:
    """The names of the caller's variables that a notebook does not get, or gets with another value."""
    clean = _environment(base, False, {})
    return sorted(name for name, value in base.items() if clean.get(name) != value)
