"""Run one notebook in a process of its own: ``python -m helpers.runs.child``, started by ``supervision``.

Standard input carries one JSON line, the job, and then stays open: when it ends, the runner is gone, and this process
kills the kernel, everything the kernel started, and itself. A further line there, {"late": "why"}, says that the time
of the notebook or the cell has run out: the cell is interrupted, so that its traceback shows where it was. Only the
runner measures time. Standard output carries the events, one JSON line each:

    {"event": "ready", "cells": 12}                                             the kernel is up
    {"event": "started", "cell": 3, "line": "first line of the cell"}
    {"event": "finished", "cell": 3}
    {"event": "end", "reason": null or "why the notebook failed"}

What the kernel and its children print outside of cells goes to standard error. papermill is given no output file: it
would save secrets, and, after a kernel's death, cells that never ran as completed. The executed notebook is saved
here, redacted, after each cell.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Required, TypedDict, cast

from helpers.base.families import ending_descendants
from helpers.base.files import write_text
from helpers.base.installed import damage
from helpers.base.parent import Parent
from helpers.runs.document import _make_runnable
from helpers.runs.kernel import _kernel_specs
from helpers.runs.saving import _Document

if TYPE_CHECKING:
    from types import ModuleType

    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbformat import NotebookNode  # noqa: TC004 (it takes seconds to import)
    from papermill.engines import Engine

    from helpers.base.processes import Message
    from helpers.runs.capturing import _Widgets

_IOPUB_SECONDS = 60
_NEVER = 10**9  # seconds


@dataclass(frozen=True)
class _Job:
    """What a notebook is run with; the runner watches over its seconds.

    ``secrets`` are blanked wherever the notebook's outputs hold them.

    ``mark`` is that of this process; the kernel and all that it starts inherit it.
    """

    notebook: str
    output: str
    parameters: dict[str, object]
    seconds: float
    cell_seconds: float
    secrets: tuple[str, ...]
    mark: str = ""


class _Event(TypedDict, total=False):
    """One event, as listed above."""

    event: Required[Literal["ready", "started", "finished", "end"]]
    cell: int
    cells: int
    line: str
    reason: str | None


class _Answer(TypedDict, total=False):
    """The kernel's answer to a cell: the part of a message of type execute_reply that is looked at here."""

    status: Required[str]
    ename: str
    evalue: str
    payload: list[dict[str, object]]


class _Reply(TypedDict):
    content: _Answer


class _Stopped(Exception):  # noqa: N818 (it ends a notebook, and is no error of this process)
    """The notebook goes no further: a cell failed or ran past its time."""


@dataclass
class _Watcher:
    """Follows one notebook through nbclient's hooks: reports each cell, ends a late one, saves the outputs.

    ``late`` is what the runner says when the time has run out.
    """

    job: _Job
    emit: Callable[[_Event], None]
    notebook: NotebookNode | None = None
    cell: int = 0
    cells: int = 0
    current: NotebookNode | None = None
    reason: str | None = None
    late: str | None = None
    interrupt: Callable[[], object] | None = None
    document: _Document = field(init=False)

    def __post_init__(self) -> None:
        self.document = _Document(self.job.secrets)

    def on_notebook_start(self, notebook: NotebookNode) -> None:
        """The kernel is up."""
        self.notebook = notebook
        self.cells = len([cell for cell in notebook.cells if _is_executed(cell)])
        self.emit({"event": "ready", "cells": self.cells})

    def on_cell_execute(self, cell: NotebookNode, **_: object) -> None:
        """A code cell is about to run."""
        if self.late:
            self.reason = self.late
            raise _Stopped
        self.cell += 1
        self.current = cell
        line = cell.source.strip().splitlines()[0]
        self.emit({"event": "started", "cell": self.cell, "line": line})

    def take(self, message: Message) -> None:
        """The runner says that the time has run out. Another thread calls this."""
        self.late = message["late"]
        if self.current is not None and self.interrupt:
            self.interrupt()

    def on_cell_executed(self, cell: NotebookNode, execute_reply: _Reply, **_: object) -> None:
        """The kernel answered: judge the cell, save the notebook."""
        self.reason = self.late or self._error(cell, execute_reply["content"])
        self.current = None
        self.save()
        self.emit({"event": "finished", "cell": self.cell})
        if self.reason:
            raise _Stopped

    def kernel_died(self) -> None:
        """The kernel is gone: say so in the reason and in the cell that it left unfinished."""
        from nbformat.v4 import new_output

        if self.current is None:
            self.reason = "kernel died before the first cell"
            if self.cell:
                self.reason = f"kernel died after cell {self.cell}"
            return
        self.reason = self.late or f"kernel died at cell {self.cell}"
        text = f"The kernel died while this cell ran ({self.reason})."
        self.current.outputs.append(new_output("error", ename="KernelDied", evalue=text, traceback=[text]))

    def save(self) -> None:
        """Write the notebook as it stands, redacted, without papermill's metadata."""
        if self.notebook is None:
            return
        write_text(Path(self.job.output), self.document.text(self.notebook))

    def _error(self, cell: NotebookNode, reply: _Answer) -> str | None:
        if any(item.get("source") == "ask_exit" for item in reply.get("payload", [])):
            return f"cell {self.cell} asked the kernel to exit"
        if reply["status"] != "error" or "raises-exception" in cell.metadata.get("tags", []):
            return None
        text = " ".join(str(reply.get("evalue", "")).split())
        return f"error in cell {self.cell}: {reply.get('ename', 'unknown')}: {text}"


def _is_executed(cell: NotebookNode) -> bool:
    """False for a cell that nbclient passes over: a text, an empty cell, one tagged to be skipped."""
    if cell.cell_type != "code" or not cell.source.strip():
        return False
    return "skip-execution" not in cell.metadata.get("tags", [])


def _kernel_manager(watcher: _Watcher) -> type[AsyncKernelManager]:
    """A manager that starts the clean kernel of ``kernel``, and gives the watcher the means to interrupt it."""
    import asyncio

    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class CleanKernelManager(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _kernel_spec_manager_default(self) -> KernelSpecManager:
            return _kernel_specs(watcher.job.mark)

        async def start_kernel(self, **options: object) -> None:  # type: ignore[override]  # as in its base class
            # The end that is not closed stays open while this process lives: the kernel's input ends with it.
            self.alive = os.pipe()
            await super().start_kernel(stdin=self.alive[0], **options)
            os.close(self.alive[0])
            loop = asyncio.get_running_loop()
            watcher.interrupt = partial(loop.call_soon_threadsafe, self._interrupt)

        def _interrupt(self) -> None:
            self.interrupting = asyncio.ensure_future(self.interrupt_kernel())

    return CleanKernelManager


def _engine(widgets: _Widgets) -> type[Engine]:
    """papermill's own engine, whose client captures what output widgets would show."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class Capturing(Engine):  # type: ignore[misc]  # papermill has no types
        @classmethod
        def execute_managed_notebook(cls, manager: object, kernel_name: str, **options: object) -> NotebookNode:
            del options["input_path"]
            client = PapermillNotebookClient(
                manager, kernel_name=kernel_name, startup_timeout=options.pop("start_timeout"), **options
            )
            client.widget_registry = widgets.registry()
            executed: NotebookNode = client.execute()
            return executed

    return Capturing


def _execute(watcher: _Watcher) -> str | None:
    """Run the notebook; None, or why it failed. Raises OSError when the executed notebook cannot be written."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        _execute_cells(watcher)
    except DeadKernelError:
        watcher.kernel_died()
    except _Stopped:
        pass
    except PapermillExecutionError:
        # papermill takes each error that a cell shows for a failure, even one that the cell was tagged to raise, and
        # has put cells about it into the notebook. The watcher judged every cell, and saved the last one before that.
        watcher.notebook = None
    watcher.save()
    if watcher.reason is None and watcher.cell < watcher.cells:
        return f"stopped after cell {watcher.cell} of {watcher.cells}"
    return watcher.reason


def _execute_cells(watcher: _Watcher) -> None:
    import nbformat
    import papermill

    job = watcher.job
    papermill.engines.papermill_engines.register("workbook", _engine(watcher.document.widgets))
    papermill.execute_notebook(
        _make_runnable(nbformat.read(job.notebook, as_version=4), Path(job.notebook).parent),
        None,  # no output file: see above
        job.parameters,
        engine_name="workbook",
        kernel_name="python3",
        language="python",
        kernel_manager_class=_kernel_manager(watcher),
        progress_bar=False,
        cwd=str(Path(job.notebook).parent),
        # The runner's clock alone decides: it knows when this process was stopped.
        start_timeout=_NEVER,
        timeout=None,
        iopub_timeout=_IOPUB_SECONDS,
        extra_arguments=["--log-level=ERROR"],
        # What widgets captured is shown in their place: that needs the states of all, of which none is saved.
        store_widget_state=True,
        # nbclient's way of merging takes the square of a line's length, and changes the order.
        coalesce_streams=False,
        on_notebook_start=watcher.on_notebook_start,
        on_cell_execute=watcher.on_cell_execute,
        on_cell_executed=watcher.on_cell_executed,
    )


def _main() -> None:
    """Read the job, run it, report the end."""
    # jsonschema's optional check of addresses builds a grammar for a second at import; notebooks need none.
    sys.modules.setdefault("rfc3987_syntax", cast("ModuleType", None))
    parent = Parent()
    message = parent.receive()
    job = _Job(**{**message, "secrets": tuple(message["secrets"])})
    # What the kernel leaves behind is killed while it is still this process's.
    with ending_descendants(job.mark):
        watcher = _Watcher(job, parent.send)
        parent.end_with_it(job.mark, watcher.take)
        try:
            reason = _execute(watcher)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}. {damage()}".removesuffix(". ")
            sys.excepthook(type(error), error, error.__traceback__)
    parent.send({"event": "end", "reason": reason})


if __name__ == "__main__":
    _main()
