"""HTML pages of a run: how a template is filled, a page per executed notebook, and the words for the roles of models.

The report and the comparison of two runs are made with the same templates, in the folder ``templates``.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import write_text
from helpers.base.text import visible
from helpers.runs.folder import GLOSSARY, _executed_notebook, _kept_glossary
from helpers.runs.outputs import _presentable
from helpers.runs.redaction import for_screen

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

ROLES = {"falcon": "Falcon, base", "falcon_chat": "Falcon, chat", "llama_chat": "Llama, chat"}
_TEMPLATES = Path(__file__).parent / "templates"
# The forms of an output that ``outputs`` leaves.
_SHOWN = ["text/html", "image/png", "image/jpeg", "text/plain"]
_GLOSSARY_LINK = re.compile(r"\[([^\]]*)\]\(GLOSSARY\.md(#[^)\s]*)?\)")
_NOTEBOOK_LINK = re.compile(r"\]\(([\w.-]+)\.ipynb(#[^)\s]*)?\)")


def _render_page(template: str, content: Mapping[str, object]) -> str:
    """Fill a template of the folder ``templates`` with ``content``, which is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return _finished(environment.get_template(template).render(content))


def _write_pages(run_dir: Path, notebooks: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Write ``html/<notebook>.html`` for each executed notebook that is newer than its page.

    If a page is new, all are written: links to it led elsewhere before. Returns the pages' paths, relative to the
    run folder, by notebook, and a sentence for each page that could not be made; a notebook that never started has
    neither.
    """
    sources = _sources(run_dir, notebooks)
    pages = {name: f"html/{name}.html" for name in sources}
    stale = _stale(run_dir, sources, pages)
    if not stale:
        return pages, []
    exporter, problems = _exporter(), []
    for name in stale:
        try:
            (run_dir / "html").mkdir(exist_ok=True)
            write_text(run_dir / pages[name], _page(exporter, sources[name], run_dir.resolve().name, pages))
        except Exception as error:  # whatever a library makes of a notebook, the report and the other pages go on
            told = str(error) if isinstance(error, WorkbookError) else f"{type(error).__name__}: {error}"
            problems.append(f"The page of {name} cannot be made: {' '.join(told.split())[:500]}")
            if not (run_dir / pages[name]).exists():
                del pages[name]
    return pages, problems


def _sources(run_dir: Path, notebooks: Iterable[str]) -> dict[str, Path]:
    """The files that have a page, by its name: the executed notebooks, and the glossary that is kept beside them."""
    # First, because the others link to it only if it could be made.
    paths = {GLOSSARY: _kept_glossary(run_dir)}
    paths |= {name: _executed_notebook(run_dir, name) for name in notebooks}
    return {name: path for name, path in paths.items() if path.exists()}


def _stale(run_dir: Path, sources: Mapping[str, Path], pages: Mapping[str, str]) -> list[str]:
    """The names of the pages that are to be written."""
    if not all((run_dir / page).exists() for page in pages.values()):
        return list(pages)
    return [name for name, page in pages.items() if _is_newer(sources[name], run_dir / page)]


def _is_newer(source: Path, page: Path) -> bool:
    return source.stat().st_mtime > page.stat().st_mtime


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": _SHOWN}),
        extra_template_paths=[str(_TEMPLATES)],
        template_file="notebook.html.j2",
    )
    # ``outputs`` has made it HTML.
    exporter.register_filter("markdown2html", _unchanged)
    return exporter


def _unchanged(text: str) -> str:
    return text


def _page(exporter: HTMLExporter, path: Path, run: str, pages: Container[str]) -> str:
    notebook = _linked(_read(path), pages)
    resources = {"metadata": {"name": path.stem}, "run": run}
    page: str
    page, _ = exporter.from_notebook_node(_presentable(notebook, path.stem), resources=resources)
    return _finished(page)


def _read(path: Path) -> NotebookNode:
    """A notebook; a file of markdown is one of a single cell."""
    import nbformat
    from nbformat.v4 import new_markdown_cell, new_notebook

    notebook: NotebookNode
    if path.suffix == ".md":
        notebook = new_notebook(cells=[new_markdown_cell(path.read_text(encoding="utf-8"))])
        return notebook
    with warnings.catch_warnings():  # such as of two cells of one id, which no page shows
        warnings.simplefilter("ignore")
        notebook = nbformat.read(path, as_version=4)
    return notebook


def _finished(page: str) -> str:
    """A page without secrets, and with all that it holds to be seen.

    Once more: as HTML a token may be whole that was written in codes, or that an earlier workbook left.
    """
    return visible(for_screen(page))


def _linked(notebook: NotebookNode, pages: Container[str]) -> NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _link_to_pages(cell.source, pages)
    return notebook


def _link_to_pages(markdown: str, pages: Container[str]) -> str:
    """Return markdown whose links lead to pages: to notebooks, or to the report's table if there is no page.

    Links to the glossary lead to its page; an earlier run has none, and shows their words alone.
    """

    def address(match: re.Match[str]) -> str:
        name, anchor = match[1], match[2] or ""
        if name in pages:
            return f"]({name}.html{anchor})"
        return "](../report.html#notebooks)"

    entry = rf"[\1]({GLOSSARY}.html\2)" if GLOSSARY in pages else r"\1"
    return _GLOSSARY_LINK.sub(entry, _NOTEBOOK_LINK.sub(address, markdown))
