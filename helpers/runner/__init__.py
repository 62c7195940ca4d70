"""papermill over all notebooks: budgets, live progress, resume, a status of its own, and a manifest.

``execution`` drives a run; ``notebook`` reads a notebook's file; ``parameters`` checks what a run is asked;
``declaration`` which models its notebooks declare and load; ``fetching`` gets the models; ``supervision`` runs
one notebook in ``child``, a process of its own; ``folder``, ``manifest`` and ``redaction`` keep the run folder;
``rendering`` makes the committed notebooks from their sources.
"""

from helpers.runner.execution import NOTEBOOKS, Request, RunError, RunResult, run
from helpers.runner.fetching import fetch
from helpers.runner.notebook import UsageError, cells_hash
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
