"""The models of a profile, fetched in a process of its own, which runs ``main``.

huggingface_hub downloads several files at a time in threads that nothing can interrupt: a process that downloads would
answer Ctrl-C only at the end of these files, gigabytes each. The child is killed instead, and the files that it had not
completed are deleted, which no later download would take up.

Its standard input carries one JSON line, the job, and then stays open: when it ends, the parent is gone, and the child
ends itself. What it says goes to the parent's terminal; how it ended, into the job's file ``answer``:

    {"commits": {"tiiuae/falcon-180B": "..."}} or {"error": "why they cannot be had"}
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from helpers.runner.parameters import read_notebook
from helpers.shards import LoadError
from helpers.types import ROOT, Profile, WorkbookError

MAIN = "from helpers.runner.fetching import main; main()"


def fetch(
    profile: Profile, roles: Collection[str] | None = None, commits: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Fetch what loading a profile's models (of ``roles``, if given) needs; the commit of each of a hub, by its id.

    ``commits``, such as an earlier call's, are kept to. How far it is, is shown on the terminal. Raises LoadError. An
    interruption, such as KeyboardInterrupt, ends it at once; what is complete is kept.
    """
    with TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        job = {"profile": asdict(profile), "roles": None if roles is None else sorted(roles), "answer": str(answer)}
        with _child(job, {**os.environ, "WORKBOOK_REVISIONS": json.dumps(dict(commits or {}))}) as child:
            code = child.wait()
        if not answer.exists():
            raise LoadError(f"fetching the models of {profile.name} ended unexpectedly (exit code {code}): try again.")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise LoadError(found["error"])
    return found["commits"]


def named_roles(profile: Profile, notebooks: Iterable[Path]) -> list[str]:
    """The roles of the models that the code of some notebooks names, as in ``settings.falcon_chat``."""
    cells = [cell for path in notebooks for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    return [role for role in profile.models if re.search(rf"\.({role}|models)\b", code)]


@contextmanager
def _child(job: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", MAIN]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ, cwd=ROOT, start_new_session=True)
    try:
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child, where it still runs, and delete the files that it was downloading."""
    import psutil

    unfinished: list[str] = []
    if child.poll() is None:
        with suppress(psutil.Error):
            process = psutil.Process(child.pid)
            process.suspend()
            unfinished = [file.path for file in process.open_files() if file.path.endswith(".incomplete")]
        child.kill()
        child.wait()
    with suppress(BrokenPipeError):
        child.stdin.close()
    for path in unfinished:
        Path(path).unlink(missing_ok=True)


def _die_with_parent(stream: BinaryIO) -> None:
    stream.read()
    os._exit(1)


def main() -> None:
    """Read the job, do it, and leave the answer."""
    from pydantic import TypeAdapter

    from helpers.loading import prepare

    stream = os.fdopen(os.dup(0), "rb", buffering=0)
    job = json.loads(stream.readline())
    threading.Thread(target=_die_with_parent, args=(stream,), daemon=True).start()
    try:
        answer = {"commits": prepare(TypeAdapter(Profile).validate_python(job["profile"]), roles=job["roles"])}
    except WorkbookError as error:
        answer = {"error": str(error)}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
