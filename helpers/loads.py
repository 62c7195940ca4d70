"""The models that a run really loaded: noted by ``loading.load`` in the run folder, read by the runner.

``loaded/<notebook>.jsonl`` in the run folder holds one ``Load`` a line. A run is active if ``WORKBOOK_RUN_DIR`` names
its folder; without one nothing is noted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.types import ModelRef


@dataclass(frozen=True)
class Load:
    """One model that a notebook loaded.

    ``commit`` is None unless the model really comes from a hub. ``made_here``: the notebook itself wrote the
    checkpoint, as when it saves a model and loads it again; ``model`` is then the name of its folder.
    """

    model: str
    label: str
    precision: str
    commit: str | None
    made_here: bool


def note_load(ref: ModelRef, precision: str, checkpoint: Path) -> None:
    """Append the load of a checkpoint to the notes of the active run, if there is one."""
    run, notebook = os.environ.get("WORKBOOK_RUN_DIR"), os.environ.get("WORKBOOK_NOTEBOOK")
    if not run or not notebook:
        return
    # Profiles name models by a hub's id or a folder of this repository; only ``save`` and ``merge`` make whole paths.
    made_here = Path(ref.id).is_absolute()
    commit = None
    if ref.source == "hub" and not ref.rehearsed:
        commit = checkpoint.name  # the hub's cache names a snapshot's folder so
    load = Load(ref.name if made_here else ref.id, ref.label, precision, commit, made_here)
    file = _file(Path(run), notebook)
    file.parent.mkdir(exist_ok=True)
    # One write of one line: the processes of a training append to the same file.
    with file.open("a", encoding="utf-8") as notes:
        notes.write(json.dumps(asdict(load)) + "\n")


def read_loads(run: Path, notebook: str) -> list[Load]:
    """Return what a notebook of a run loaded, in order and each load once."""
    file = _file(run, notebook)
    if not file.exists():
        return []
    loads: dict[Load, None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        loads[Load(**json.loads(line))] = None
    return list(loads)


def forget_loads(run: Path, notebook: str) -> None:
    """Drop the notes of a notebook that is about to run again."""
    _file(run, notebook).unlink(missing_ok=True)


def _file(run: Path, notebook: str) -> Path:
    return run / "loaded" / f"{notebook}.jsonl"
