"""Make the committed notebooks from their sources (jupytext, py:percent), with the outputs of a run.

A cell's id follows from its text, so a cell that did not change keeps its outputs. What belongs to one machine or one
run, such as paths, memory addresses and injected parameters, is taken out.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.files import ROOT, write_text
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.terminal import Terminal
from helpers.runs.document import UsageError, _make_portable
from helpers.runs.execution import NOTEBOOKS, run
from helpers.runs.folder import _executed_notebook
from helpers.runs.request import Request

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from helpers.models.references import Profile
    from helpers.runs.execution import RunResult

_KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_ADDRESS = re.compile(r"( at )0x[0-9a-f]{6,}")


def render(
    profile: Profile | str = DEFAULT_PROFILE, notebooks: Path = NOTEBOOKS, folder: Path | None = None
) -> RunResult:
    """Write the notebooks again from their sources, run them, and keep the outputs of those that passed."""
    _sync(notebooks)
    request = Request(profile, notebooks=notebooks, folder=folder)
    result = run(request, command=("workbook", "render"), console=Terminal())
    for name in result.passed:
        notebook = _source_notebook(notebooks / "source" / f"{name}.py")
        _copy_outputs(_clean(_read(_executed_notebook(result.folder, name))), notebook)
        _write(notebooks / f"{name}.ipynb", notebook)
    return result


def _sync(notebooks: Path = NOTEBOOKS) -> list[Path]:
    """Write each notebook again from ``source/``, keeping the outputs of cells that did not change.

    Raises UsageError, before anything is written, if a notebook has what its source does not have.
    """
    made: dict[Path, NotebookNode] = {}
    for source in sorted((notebooks / "source").glob("*.py")):
        target = notebooks / f"{source.stem}.ipynb"
        made[target] = _source_notebook(source)
        if target.exists():
            earlier = _read(target)
            _check_nothing_is_lost(earlier, made[target], target)
            _copy_outputs(earlier, made[target])
    return [_write(target, notebook) for target, notebook in made.items()]


def _check_nothing_is_lost(earlier: NotebookNode, notebook: NotebookNode, target: Path) -> None:
    """Raise UsageError if somebody has written into the earlier notebook, and not into its source.

    The id of a rendered cell follows from its text, so a cell whose id does not was added or changed by hand.
    """
    sources = {cell.source.rstrip() for cell in notebook.cells}
    additions = []
    for number, cell in enumerate(earlier.cells, 1):
        if cell.get("attachments"):
            additions.append(f"an attachment in cell {number}")
        rendered = cell.get("id", "").partition("-")[0] == _digest(cell)
        if cell.source.strip() and not rendered and cell.source.rstrip() not in sources:
            additions.append(f"cell {number} ({cell.source.strip().splitlines()[0][:60]!r})")
    if additions:
        raise UsageError(
            f"{target} has what its source does not have: {'; '.join(additions)}. Rendering would erase it. Move it to "
            f"source/{target.stem}.py, or delete the notebook."
        )


def _source_notebook(source: Path) -> NotebookNode:
    """The notebook that a py:percent source describes, without outputs, with ids that depend on its cells alone."""
    import jupytext
    from nbformat import from_dict

    notebook: NotebookNode = jupytext.read(source, fmt={"extension": ".py", "format_name": "percent"})
    metadata = {"kernelspec": _KERNELSPEC, "language_info": {"name": "python"}}
    if "workbook" in notebook.metadata:  # the declared models, which the runner reads
        metadata["workbook"] = notebook.metadata["workbook"]
    notebook.metadata = from_dict(metadata)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    _name_cells(notebook)
    return notebook


def _name_cells(notebook: NotebookNode) -> None:
    """Give each cell an id that follows from its text: a cell that did not change keeps its outputs."""
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        digest = _digest(cell)
        seen[digest] += 1
        cell.id = digest
        if seen[digest] > 1:
            cell.id = f"{digest}-{seen[digest]}"


def _digest(cell: NotebookNode) -> str:
    return hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]


def _copy_outputs(executed: NotebookNode, notebook: NotebookNode) -> None:
    """Give the cells of ``notebook`` the outputs of the cells with the same id."""
    done = {}
    for cell in executed.cells:
        if cell.cell_type == "code" and "id" in cell:
            done[cell.id] = cell
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id in done:
            cell.outputs, cell.execution_count = done[cell.id].outputs, done[cell.id].execution_count


def _clean(notebook: NotebookNode) -> NotebookNode:
    """An executed notebook without what belongs to one run: injected parameters, counts, paths, addresses."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    _make_portable(notebook)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip():
            number += 1
            cell.execution_count = number
            for output in cell.outputs:
                _clean_output(output, number)
    return notebook


def _clean_output(output: NotebookNode, number: int) -> None:
    if "execution_count" in output:
        output.execution_count = number
    for key, value in output.items():
        output[key] = _neutral(value)


def _neutral(value: object) -> object:
    """Without this machine's folders and memory addresses."""
    if isinstance(value, str):
        for path, name in _paths().items():
            value = value.replace(path, name)
        return _ADDRESS.sub(r"\g<1>0x…", value)
    if isinstance(value, dict):
        # Of the same class: nbformat reads the keys of its nodes as attributes.
        return type(value)((key, _neutral(item)) for key, item in value.items())
    if isinstance(value, list):
        return [_neutral(item) for item in value]
    return value


def _paths() -> dict[str, str]:
    """This machine's folders and what stands for them, the longest first: the environment lies in the project."""
    paths = {f"{ROOT}/": "", str(ROOT): ".", sys.prefix: "$VIRTUAL_ENV", str(Path.home()): "~"}
    ordered = {}
    for path in sorted(paths, key=len, reverse=True):
        if len(path) > 2:  # not the root folder, as the home of a service may be
            ordered[path] = paths[path]
    return ordered


def _read(path: Path) -> NotebookNode:
    import nbformat

    try:
        notebook: NotebookNode = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not a whole notebook. Restore it, or delete it to have it made again.") from error
    return notebook


def _write(path: Path, notebook: NotebookNode) -> Path:
    import nbformat

    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook) + "\n")
    return path
