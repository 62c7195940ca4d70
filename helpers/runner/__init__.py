"""papermill over all notebooks: budgets, live progress, resume, a status of its own, and a manifest.

``execution`` drives a run; ``parameters`` checks what it is asked; ``fetching`` gets the models; ``supervision`` runs
one notebook in ``child``, a process of its own; ``processes`` ends what is left of it; ``folder``, ``manifest`` and
``redaction`` keep the run folder; ``rendering`` makes the committed notebooks from their sources.
"""

from helpers.runner.execution import NOTEBOOKS, Request, RunError, RunResult, run
from helpers.runner.fetching import fetch
from helpers.runner.parameters import UsageError, cells_hash
from helpers.runner.rendering import render, sync
from helpers.store import RunFolderError, read_manifest, read_status

__all__ = [
    "NOTEBOOKS",
    "Request",
    "RunError",
    "RunFolderError",
    "RunResult",
    "UsageError",
    "cells_hash",
    "fetch",
    "read_manifest",
    "read_status",
    "render",
    "run",
    "sync",
]
