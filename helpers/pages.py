"""The executed notebooks of a run as HTML pages that load nothing and run no script."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.files import write_text
from helpers.runner import NOTEBOOKS
from helpers.runner.folder import executed_notebook

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent
# Of what an output offers, the first of these is shown. Widgets and scripts would need a kernel or a network.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
_NOTEBOOK_LINK = re.compile(r"\]\(([\w.-]+)\.ipynb(#[^)\s]*)?\)")


def write_pages(run_dir: Path, notebooks: Iterable[str]) -> dict[str, str]:
    """Write ``html/<notebook>.html`` for each executed notebook that is newer than its page.

    Where a page is new, all are written: links to it led elsewhere before. Returns the pages' paths, relative to the
    run folder, by notebook; a notebook that never started has none.
    """
    executed = {name: executed_notebook(run_dir, name) for name in notebooks}
    executed = {name: path for name, path in executed.items() if path.exists()}
    pages = {name: f"html/{name}.html" for name in executed}
    new = any(not (run_dir / page).exists() for page in pages.values())
    stale = [name for name, path in executed.items() if new or _is_newer(path, run_dir / pages[name])]
    if stale:
        (run_dir / "html").mkdir(exist_ok=True)
        exporter = _exporter()
        for name in stale:
            write_text(run_dir / pages[name], _page(exporter, executed[name], run_dir.resolve().name, pages))
    return pages


def link_to_pages(markdown: str, pages: Iterable[str]) -> str:
    """Markdown whose links to notebooks lead to their pages, or to the report's table where there is no page."""

    def address(match: re.Match[str]) -> str:
        name, anchor = match[1], match[2] or ""
        return f"]({name}.html{anchor})" if name in pages else "](../report.html#notebooks)"

    return _NOTEBOOK_LINK.sub(address, markdown)


def _is_newer(source: Path, page: Path) -> bool:
    return source.stat().st_mtime > page.stat().st_mtime


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    return HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": SHOWN}),
        extra_template_paths=[str(TEMPLATES)],
        template_file="notebook.html.j2",
        embed_images=True,
        exclude_anchor_links=True,
    )


def _page(exporter: HTMLExporter, path: Path, run: str, pages: Iterable[str]) -> str:
    import nbformat

    notebook = _linked(nbformat.read(path, as_version=4), pages)
    resources: dict[str, Any] = {"metadata": {"name": path.stem, "path": str(NOTEBOOKS)}, "run": run}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def _linked(notebook: NotebookNode, pages: Iterable[str]) -> NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_to_pages(cell.source, pages)
    return notebook
