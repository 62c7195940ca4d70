"""Executed notebooks that show the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def make_portable(notebook: NotebookNode) -> None:
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
