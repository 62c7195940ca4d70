"""What a notebook file holds, read without nbformat: its cells' hash and its parameters."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.types import WorkbookError

Document = Mapping[str, Any]  # a notebook's JSON
_Cell = Mapping[str, Any]


class UsageError(WorkbookError):
    """A request that cannot be run as it stands: an unknown notebook, parameter, type or profile."""


def read_notebook(path: Path) -> dict[str, Any]:
    """Return a notebook's JSON, unvalidated (nbformat takes seconds to import). Raises UsageError when damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: generate it again with 'workbook render'") from error
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise UsageError(f"{path} is not a notebook: generate it again with 'workbook render'")
    return document


def cells_hash(notebook: Document) -> str:
    """SHA-256 over the cells' types, tags and texts; outputs, ids and other metadata do not count."""
    described = []
    for cell in notebook["cells"]:
        # Without spaces at the end: jupytext drops them on its way through a source.
        described.append([cell["cell_type"], sorted(_tags(cell)), _source(cell).rstrip()])
    return hash_of(described)


def hash_of(value: object) -> str:
    """SHA-256 of a value as JSON, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def declared_parameters(notebook: Document, title: str) -> dict[str, Any]:
    """Return the names and default values of the cell tagged ``parameters``.

    Raises UsageError when there is no such cell, or a default is not a literal (papermill would not compute it).
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in _tags(cell)]
    if len(cells) != 1:
        raise UsageError(f"{title} needs exactly one cell tagged 'parameters', and has {len(cells)}")
    defaults = {}
    for statement in ast.parse(_source(cells[0])).body:
        name, value = _assignment(statement)
        if name is None or value is None:
            continue
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError as error:
            raise UsageError(f"{title}: the parameter {name} must be a plain value, not a computed one") from error
    return defaults


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and value of an assignment to one name; None for any other statement."""
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def _tags(cell: _Cell) -> list[str]:
    tags: list[str] = cell.get("metadata", {}).get("tags", [])
    return tags


def _source(cell: _Cell) -> str:
    """A cell's text, which the format allows to be a list of lines."""
    return "".join(cell["source"])
