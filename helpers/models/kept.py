"""Quantized copies of checkpoints: saved at the first load, so that later loads read a quarter or half of the bytes.

A model's entry in a profile names the precisions that it keeps (``keep: [nf4]``). A copy belongs to the very files it
was made from, by their hashes, and to the libraries that made it. It gets its name when it is whole. transformers reads
it with up to four threads; while it quantizes, it reads with one, lest unquantized layers pile up on the GPUs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.errors import WorkbookError
from helpers.base.files import read_json, write_json
from helpers.base.progress import bar_class, bars
from helpers.base.units import QUANTIZED
from helpers.models.checkpoint import LoadError, content_hashes
from helpers.models.layers import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from helpers.models.references import ModelRef

_RECORD = "copy.json"
_SHARD = "5GB"  # several files, because several threads read them
_SPARE_BYTES = 2 * 10**9  # what stays free on the disk


def _find_copy(ref: ModelRef, checkpoint: Path, precision: str, *, double_quant: bool) -> Path | None:
    """The folder of the copy of a checkpoint in a precision; None if there is none, or if its files have changed.

    Whoever loads the model finds it, such as ``training.reload``: the profile only says whether it is saved.
    """
    # A hub's files are known by their hashes already; those of other folders would have to be read for it.
    if precision not in QUANTIZED or not (ref.keep or ref.source == "hub") or not _copies().is_dir():
        return None
    folder = _folder(ref, checkpoint, precision, double_quant=double_quant)
    try:
        whole = read_json(folder / _RECORD) == _states(folder)
    except (OSError, WorkbookError):
        return None
    return folder if whole else None


def _save_copy(
    model: PreTrainedModel, ref: ModelRef, checkpoint: Path, precision: str, *, double_quant: bool
) -> Path | None:
    """Save a model that was just quantized, before its first forward pass, which may repack it; None if it is not kept.

    A disk without enough free bytes is no error: the next load quantizes again. Raises LoadError if writing fails.
    """
    # Of several processes that load the same model, none saves: they would write the same files.
    if precision not in QUANTIZED or precision not in ref.keep or "WORLD_SIZE" in os.environ:
        return None
    folder = _folder(ref, checkpoint, precision, double_quant=double_quant)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < stored_bytes(model) + _SPARE_BYTES:
        return None
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with bars(bar_class()):
            model.save_pretrained(part, max_shard_size=_SHARD)
        write_json(part / _RECORD, _states(part))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise LoadError(
            f"The {precision} copy of {ref.label} could not be saved to {folder.parent}: {error.strerror or error}. "
            f"Set WORKBOOK_CACHE to a folder of yours, or remove `keep` from the model's entry in the profile."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _copies() -> Path:
    """The folder of all copies. A rehearsal leaves nothing outside of its own."""
    return (settings.rehearsal_folder() or settings.cache_folder()) / "quantized"


def _folder(ref: ModelRef, checkpoint: Path, precision: str, *, double_quant: bool) -> Path:
    """Where the copy is, or will be: its name follows from all that decides its bytes."""
    made_of = {
        "files": content_hashes(checkpoint),
        "double_quant": double_quant,
        "libraries": {name: version(name) for name in ("transformers", "bitsandbytes")},
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return _copies() / f"{ref.name}-{precision}-{key}"


def _states(folder: Path) -> dict[str, list[int]]:
    """Size, inode and times of each file: they change with its content, and cost no reading of the bytes."""
    states = {}
    for file in sorted(folder.iterdir()):
        if file.name != _RECORD:
            status = file.stat()
            states[file.name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return states
