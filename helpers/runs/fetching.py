"""Download the models of a profile in a process of their own: ``python -m helpers.runs.fetching``.

huggingface_hub downloads several files at a time in threads that nothing can interrupt: a process that downloads would
answer Ctrl-C only at the end of these files, gigabytes each. The child is killed instead, and the files that it had not
completed are deleted, which no later download would take up.

Its standard input carries one JSON line, the job, and then stays open: when it ends, the parent is gone, and the child
ends itself. What it says goes to the parent's terminal; how it ended, into the job's file ``answer``:

    {"commits": {"tiiuae/falcon-180B": "..."}} or {"error": "why they could not be downloaded"}
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.isolation import isolated
from helpers.base.parent import Parent
from helpers.base.processes import ChildProcess
from helpers.models.checkpoint import LoadError
from helpers.models.references import Profile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def fetch(
    profile: Profile, roles: Collection[str] | None = None, commits: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Fetch what loading a profile's models (of ``roles``, if given) needs, and return their commits by model id.

    Only models of the hub have a commit. ``commits``, such as an earlier call's, are kept to. The terminal shows the
    progress. Raises LoadError. An interruption, such as KeyboardInterrupt, ends it at once; complete files are kept.
    """
    with TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        wanted = None if roles is None else sorted(roles)
        job = {"profile": asdict(profile), "roles": wanted, "answer": str(answer)}
        code = _run_to_end(job, {**isolated(os.environ), "WORKBOOK_REVISIONS": json.dumps(dict(commits or {}))})
        if not answer.exists():
            raise LoadError(
                f"The download of the models of {profile.name} ended unexpectedly (exit code {code}). Try again."
            )
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in told:
        raise LoadError(told["error"])
    fetched: dict[str, str] = told["commits"]
    return fetched


def _run_to_end(job: Mapping[str, object], environment: Mapping[str, str]) -> int:
    """Run the process that downloads and return its exit code; after an interruption nothing unfinished is left."""
    child = ChildProcess(
        [sys.executable, "-m", "helpers.runs.fetching"], environment=environment, cwd=ROOT, shares_output=True
    )
    try:
        with suppress(BrokenPipeError):  # its exit code says that it died before it read the job
            child.send(job)
        return child.wait()
    finally:
        # A paused process completes no file between the look at its open files and its end.
        child.pause()
        unfinished = [path for path in child.open_files() if path.endswith(".incomplete")]
        child.end()
        for path in unfinished:
            Path(path).unlink(missing_ok=True)


def _main() -> None:
    """Read the job, do it, and leave the answer."""
    from pydantic import TypeAdapter

    from helpers.models.finding import prepare

    parent = Parent(answers=False)  # the progress on standard output is for the terminal
    job = parent.receive()
    parent.end_with_it()
    profile = TypeAdapter(Profile).validate_python(job["profile"])
    answer: dict[str, object]
    try:
        answer = {"commits": prepare(profile, roles=job["roles"])}
    except WorkbookError as error:
        answer = {"error": str(error)}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    try:
        sys.stdout.flush()
    except OSError:
        # What could not be written is not tried again at the end of Python, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    _main()
