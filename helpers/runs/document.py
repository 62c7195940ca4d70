"""A notebook's file as plain JSON: what makes it a notebook, its cells, and what of it is kept when it has run.

It is read without nbformat, which takes seconds to import, so each part that is used later is checked here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from helpers.base.errors import WorkbookError

if TYPE_CHECKING:
    from pathlib import Path

    from nbformat import NotebookNode

_Document = Mapping[str, Any]  # a notebook's JSON
_Cell = Mapping[str, Any]
_FORMAT = 4
_MOST_IMAGE_BYTES = 5 * 2**20
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# The image of a markdown cell, as markdown or as HTML: what stands before its address, and the address.
_IMAGE = re.compile(r"""(!\[[^\]\n]*\]\(\s*|<img\b[^>]*?\bsrc\s*=\s*["'])([^)\s"'>]+)""", re.I)
_IMAGE_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"<svg": "image/svg+xml",
    b"<?xml": "image/svg+xml",
}


class UsageError(WorkbookError):
    """A request that cannot be run as it stands: an unknown notebook, parameter, type or profile."""


def _read_notebook(path: Path, remedy: str = "Restore it, or delete it and run 'workbook render'.") -> dict[str, Any]:
    """Return a notebook's JSON. Raises UsageError, with the remedy, for a file that is no whole notebook."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path} ({error.strerror}). Check its name and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON. {remedy}") from error
    if complaint := _complaint(document):
        raise UsageError(f"{path} {complaint} {remedy}")
    return dict(document)


def _complaint(document: object) -> str | None:
    """Why a file's JSON is not a notebook that can be run, as the end of a sentence; None if it is one."""
    if not isinstance(document, dict) or not isinstance(document.get("nbformat"), int):
        return "is not a notebook."
    if document["nbformat"] != _FORMAT:
        return (
            f"is a notebook of format {document['nbformat']}, but only format {_FORMAT} can be run. Convert it with: "
            "jupyter nbconvert --to notebook."
        )
    if not isinstance(document.get("cells"), list) or not isinstance(document.get("metadata", {}), dict):
        return "is not a notebook."
    for number, cell in enumerate(document["cells"], 1):
        if not _is_cell(cell):
            return f"is a damaged notebook: its cell {number} is not a valid one."
    return None


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
        return False
    source, metadata = cell.get("source"), cell.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(cell.get("attachments") or {}, dict):
        return False
    # Some editors write null for no tags.
    return _is_texts(metadata.get("tags") or []) and (isinstance(source, str) or _is_texts(source))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _metadata(document: _Document) -> Mapping[str, Any]:
    """What the notebook's metadata say to the workbook: its models, parameters and budget."""
    declared = document.get("metadata", {}).get("workbook", {})
    return declared if isinstance(declared, dict) else {}


def _check_kernel(document: _Document, path: Path) -> None:
    """Raise UsageError for a notebook of another language, or one that asks for another kernel than this Python's."""
    metadata = document.get("metadata", {})
    kernel, info = metadata.get("kernelspec") or {}, metadata.get("language_info") or {}
    if not isinstance(kernel, dict) or not isinstance(info, dict):
        raise UsageError(f"{path} is a damaged notebook: its kernel has no name. Choose one in Jupyter and save it.")
    name = kernel.get("name") or "python3"
    language = kernel.get("language") or info.get("name") or "python"
    if language not in ("python", "ipython"):
        raise UsageError(f"{path} is written in {language}. Only notebooks in Python can be run.")
    if name not in ("python3", "python"):
        raise UsageError(
            f"{path} asks for the kernel {name!r}. Only python3, the workbook's own, can be run: choose it in Jupyter, "
            "save the notebook and run it again."
        )


def _cells_hash(notebook: _Document) -> str:
    """SHA-256 over the cells' types, tags and texts; outputs, ids and other metadata do not count."""
    described = []
    for cell in notebook["cells"]:
        # Without spaces at the end: jupytext drops them on its way through a source.
        described.append([cell["cell_type"], sorted(_tags(cell)), _source(cell).rstrip()])
    return _hash_of(described)


def _hash_of(value: object) -> str:
    """SHA-256 of a value as JSON, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tags(cell: _Cell) -> list[str]:
    # Some tools write null where there are none.
    tags = cell.get("metadata", {}).get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _source(cell: _Cell) -> str:
    """A cell's text, which the format allows to be a list of lines."""
    return "".join(cell["source"])


def _make_runnable(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Mend what the libraries stumble over, and attach the images that markdown cells take from ``folder``.

    The executed copy lies in the run's folder, where the addresses of its images would lead nowhere.
    """
    for cell in notebook.cells:
        if cell.metadata.get("tags", []) is None:
            del cell.metadata["tags"]
        if cell.cell_type == "markdown":
            _attach_images(cell, folder)
    return notebook


def _attach_images(cell: NotebookNode, folder: Path) -> None:
    def attached(match: re.Match[str]) -> str:
        before, address = match[1], match[2]
        image = None if ":" in address else _image(folder / unquote(address))
        if image is None:
            return match[0]
        cell.setdefault("attachments", {})[address] = image
        return f"{before}attachment:{address}"

    cell.source = _IMAGE.sub(attached, cell.source)


def _image(path: Path) -> dict[str, str] | None:
    """An image file as an attachment, by its type; None if the file is missing, too large or not an image."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_IMAGE_BYTES:
            return None
        content = path.read_bytes()
    except (OSError, ValueError):  # ValueError: no path can hold such a name
        return None
    for beginning, mime in _IMAGE_TYPES.items():
        if content.startswith(beginning):
            return {mime: base64.b64encode(content).decode("ascii")}
    return None


def _make_portable(notebook: NotebookNode) -> None:
    """Remove papermill's records and live widgets, which would need a kernel or a CDN to show."""
    _drop_records(notebook.metadata)
    for cell in notebook.cells:
        _drop_records(cell.metadata)
        # papermill adds an empty list of tags to every cell that has none.
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET_VIEW not in output.get("data", {})]


def _drop_records(metadata: NotebookNode) -> None:
    for key in ("papermill", "widgets", "execution"):
        metadata.pop(key, None)
