"""What a page shows of an executed notebook: each cell in the best form that is safe, and no more than can be read.

An output offers itself in several forms. Where the first needs a script, as those of plotly, bokeh and altair do, the
page shows the picture or the text that is offered besides.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.runs.markup import _safe_html, _safe_latex, _safe_markdown, _svg_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbformat import NotebookNode

_MOST_LETTERS = 50_000  # of one text
_MOST_HTML = 1_000_000
_MOST_DATA = 4_000_000  # of one picture, as the notebook's file holds it
_MOST_PAGE = 10_000_000
_PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
_DATA = re.compile(r";base64,[A-Za-z0-9+/=\s]+")
_SCRIPT = re.compile(r"<script\b", re.I)
# Of HTML, what a reader sees though it is no text.
_VISIBLE = re.compile(r"<(img|audio|video|input|hr|progress|meter|math|td)\b", re.I)
_NEEDS_SCRIPTS = re.compile(r"application/(javascript|vnd\.)")


@dataclass
class _Page:
    """How much a page holds so far, and where the rest is."""

    name: str
    letters: int = 0

    def full(self, more: int) -> bool:
        """True if so many letters more are too many; otherwise they count."""
        if self.letters + more > _MOST_PAGE:
            return True
        self.letters += more
        return False

    def left_out(self, what: str, letters: int) -> str:
        """The note in the place of what is left out."""
        return _note(f"{what} of {letters:,} characters is left out here; notebooks/{self.name}.ipynb has it.")


def _presentable(notebook: NotebookNode, name: str) -> NotebookNode:
    """Change a notebook to what its page shows: HTML for markdown and raw cells, one form for each output."""
    page = _Page(name)
    for cell in notebook.cells:
        cell.source = _cut(cell.source, name)
        if cell.cell_type == "code":
            cell.outputs = [_presentable_output(output, page) for output in cell.outputs]
        elif cell.cell_type == "raw":
            cell.cell_type, cell.source = "markdown", f"<pre>{html.escape(cell.source)}</pre>"
        else:
            cell.source = _safe_markdown(cell.source, cell.get("attachments") or {})
            if page.full(len(cell.source)):
                cell.source = page.left_out("A text", len(cell.source))
    return notebook


def _presentable_output(output: NotebookNode, page: _Page) -> NotebookNode:
    size = _size(output)
    if page.full(size):
        from nbformat.v4 import new_output

        note: NotebookNode = new_output("display_data", {"text/html": page.left_out("An output", size)})
        return note
    if output.output_type == "stream":
        output.text = _cut(output.text, page.name)
    elif output.output_type == "error":
        lines = output.traceback or [f"{output.ename}: {output.evalue}"]
        output.traceback = [_cut("\n".join(lines), page.name)]
    else:
        output.data, output.metadata = _best(output.data, page), _sizes(output.metadata)
    return output


def _size(output: NotebookNode) -> int:
    """About how many letters of an output its page will hold. Known beforehand: cleaning HTML takes a second per MB."""
    if output.output_type == "stream":
        return min(len(output.text), _MOST_LETTERS)
    if output.output_type == "error":
        return min(sum(map(len, output.traceback)), _MOST_LETTERS)
    sizes = [0]
    for kind, value in output.data.items():
        # What is beyond its own limit is left out, or cut.
        if isinstance(value, str) and not _too_large(kind, value):
            sizes.append(min(len(value), _MOST_LETTERS) if kind == "text/plain" else len(value))
    return max(sizes)


def _too_large(kind: str, value: str) -> bool:
    if kind == "text/plain":  # it is cut
        return False
    if len(value) <= _MOST_HTML or not kind.startswith("text/"):
        return len(value) > _MOST_DATA
    # A sound or a picture in HTML is no work to clean.
    return len(value) > _MOST_DATA or len(_DATA.sub("", value)) > _MOST_HTML


def _best(data: Mapping[str, object], page: _Page) -> NotebookNode:
    """The best safe form of an output, by its type: HTML, a picture or a text."""
    from nbformat import from_dict

    texts = {kind: value for kind, value in data.items() if isinstance(value, str)}
    long = {kind: len(value) for kind, value in texts.items() if _too_large(kind, value)}
    form = _rich({kind: value for kind, value in texts.items() if kind not in long})
    if form is None:
        plain = _cut(texts.get("text/plain", ""), page.name)
        form = {"text/plain": plain}
        if note := _why_plain(data, texts, long, page):
            form = {"text/html": f"<pre>{html.escape(plain)}</pre>{note}"}
        elif "text/html" in texts:
            form = {"text/html": ""}  # a style sheet, or nothing: Jupyter shows nothing either
    node: NotebookNode = from_dict(form)
    return node


def _why_plain(data: Mapping[str, object], texts: Mapping[str, str], long: Mapping[str, int], page: _Page) -> str:
    """A note if an output offers more than the plain text that is shown; empty if it does not."""
    if long:
        return page.left_out(f"An output ({', '.join(long)})", max(long.values()))
    if _SCRIPT.search(texts.get("text/html", "")) or any(map(_NEEDS_SCRIPTS.match, data)):
        kinds = ", ".join(sorted(kind for kind in data if kind != "text/plain"))
        return _note(
            f"This output ({kinds}) needs scripts; this page runs none. "
            "Let the cell show a picture as well to see it here."
        )
    return ""


def _rich(texts: Mapping[str, str]) -> dict[str, str] | None:
    """The best form that is more than plain text; None if none is safe."""
    picture = _picture(texts)
    page = texts.get("text/html", "")
    # What a script would draw is better shown as the picture that is offered besides.
    if page and not (picture and _SCRIPT.search(page)):
        safe = _safe_html(page)
        if _shows_something(safe):
            return {"text/html": safe}
    if texts.get("text/markdown"):
        return {"text/html": _safe_markdown(texts["text/markdown"])}
    if texts.get("text/latex"):
        return {"text/html": _safe_latex(texts["text/latex"])}
    return picture


def _picture(texts: Mapping[str, str]) -> dict[str, str] | None:
    if drawing := texts.get("image/svg+xml"):
        return {"text/html": f'<img src="{_svg_address(drawing)}" alt="">'}
    for kind in _PICTURES:
        data = texts.get(kind)
        if data and _BASE64.fullmatch(data):
            if kind in ("image/png", "image/jpeg"):
                return {kind: data}
            return {"text/html": f'<img src="data:{kind};base64,{"".join(data.split())}" alt="">'}
    return None


def _shows_something(safe: str) -> bool:
    if _VISIBLE.search(safe):
        return True
    words = re.sub(r"<style>.*?</style>|<[^>]*>", "", safe, flags=re.S)
    return bool(html.unescape(words).strip())


def _sizes(metadata: Mapping[str, object]) -> NotebookNode:
    """The widths and heights of an output's pictures, by type. The exporter writes them as they are: only numbers."""
    from nbformat import from_dict

    sizes: dict[str, dict[str, object]] = {}
    for kind, values in metadata.items():
        if kind in _PICTURES and isinstance(values, dict):
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            sizes[kind] = {name: numbers[name] for name in ("width", "height") if name in numbers}
    node: NotebookNode = from_dict(sizes)
    return node


def _cut(text: str, name: str) -> str:
    """The beginning and the end of a long text, and between them how much is left out."""
    if len(text) <= _MOST_LETTERS:
        return text
    half = _MOST_LETTERS // 2
    more = len(text) - 2 * half
    note = f"[{more:,} characters are left out here; notebooks/{name}.ipynb has them]"
    return f"{text[:half]}\n\n{note}\n\n{text[-half:]}"


def _note(words: str) -> str:
    return f'<p class="note">{html.escape(words)}</p>'
