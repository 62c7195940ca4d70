"""The kernel of an unattended notebook: ``python -m helpers.runs.kernel MARK -f FILE``, started by ``child``.

It is ipykernel's, but starts clean: no configuration and no start-up file of the user or the machine, no history. A
module beside the notebook can be imported, but does not take the place of one of Python or of an installed package.
It ends when its input ends, because ``child`` is gone then, after everything that carries the mark.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.files import ROOT
from helpers.base.parent import Parent

if TYPE_CHECKING:
    import zmq
    from ipykernel.kernelapp import IPKernelApp
    from jupyter_client.kernelspec import KernelSpecManager


def _kernel_specs(mark: str) -> KernelSpecManager:
    """Kernel specifications with one entry: this kernel, under this interpreter, whatever the user has installed."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    command = [sys.executable, "-m", "helpers.runs.kernel", mark, "-f", "{connection_file}"]

    class OneKernel(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=command, display_name=kernel_name, language="python")

    return OneKernel(kernel_dirs=[])


def _order_path() -> None:
    """Look for modules in Python first, then in the packages, then in the checkout, then beside the notebook."""
    # The checkout's folder may be the notebook's, too. Its ``helpers`` is imported already, so it stays this one.
    folders = [folder for folder in sys.path if folder != str(ROOT)]
    sys.path[:] = [*folders, str(ROOT)]
    if Path.cwd() != ROOT:
        sys.path.append(str(Path.cwd()))


def _application() -> type[IPKernelApp]:
    import zmq
    from ipykernel.kernelapp import IPKernelApp

    class CleanKernel(IPKernelApp):
        def load_config_file(self, *_: object, **__: object) -> None:
            """No configuration: neither the user's nor the machine's."""

        def init_iopub(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
            """Where outputs leave: a cell that is quicker than their reader waits, and none is dropped."""
            context.setsockopt(zmq.XPUB_NODROP, 1)
            super().init_iopub(context)  # type: ignore[no-untyped-call]

        def init_poller(self) -> None:
            """It would end this process before what the kernel has started; ``_main`` waits for that, too."""

        def _run_startup_files(self) -> None:
            """None, for the same reason."""

    return CleanKernel


def _main() -> None:
    mark = sys.argv.pop(1)
    _order_path()
    # What a cell starts is the reader's: Python's own rules for its path hold there.
    os.environ.pop("PYTHONSAFEPATH", None)
    Parent(answers=False).end_with_it(mark)
    _application().launch_instance(argv=[*sys.argv[1:], "--HistoryManager.enabled=False"])


if __name__ == "__main__":
    _main()
