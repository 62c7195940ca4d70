"""The executed notebooks of a run as HTML pages that load nothing and run no script."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.files import write_text
from helpers.runner import NOTEBOOKS
from helpers.runner.folder import executed_notebook

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

_TEMPLATES = Path(__file__).parent
# Of what an output offers, the first of these is shown. Widgets and scripts would need a kernel or a network.
_SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
_NOTEBOOK_LINK = re.compile(r"\]\(([\w.-]+)\.ipynb(#[^)\s]*)?\)")


def write_pages(run_dir: Path, notebooks: Iterable[str]) -> dict[str, str]:
    """Write ``html/<notebook>.html`` for each executed notebook that is newer than its page.

    If a page is new, all are written: links to it led elsewhere before. Returns the pages' paths, relative to the
    run folder, by notebook; a notebook that never started has none.
    """
    executed: dict[str, Path] = {}
    pages: dict[str, str] = {}
    for name in notebooks:
        path = executed_notebook(run_dir, name)
        if path.exists():
            executed[name], pages[name] = path, f"html/{name}.html"
    new = any(not (run_dir / page).exists() for page in pages.values())
    stale = [name for name, path in executed.items() if new or _is_newer(path, run_dir / pages[name])]
    if not stale:
        return pages
    (run_dir / "html").mkdir(exist_ok=True)
    exporter = _exporter()
    for name in stale:
        write_text(run_dir / pages[name], _page(exporter, executed[name], run_dir.resolve().name, pages))
    return pages


def link_to_pages(markdown: str, pages: Container[str]) -> str:
    """Return markdown whose links to notebooks lead to their pages, or to the report's table if there is no page."""

    def address(match: re.Match[str]) -> str:
        name, anchor = match[1], match[2] or ""
        if name in pages:
            return f"]({name}.html{anchor})"
        return "](../report.html#notebooks)"

    return _NOTEBOOK_LINK.sub(address, markdown)


def _is_newer(source: Path, page: Path) -> bool:
    return source.stat().st_mtime > page.stat().st_mtime


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    return HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": _SHOWN}),
        extra_template_paths=[str(_TEMPLATES)],
        template_file="notebook.html.j2",
        embed_images=True,
        exclude_anchor_links=True,
    )


def _page(exporter: HTMLExporter, path: Path, run: str, pages: Container[str]) -> str:
    import nbformat

    notebook = _linked(nbformat.read(path, as_version=4), pages)
    # Images are embedded from where the committed notebook lies, not from the run folder.
    resources = {"metadata": {"name": path.stem, "path": str(NOTEBOOKS)}, "run": run}
    page: str
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def _linked(notebook: NotebookNode, pages: Container[str]) -> NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_to_pages(cell.source, pages)
    return notebook
