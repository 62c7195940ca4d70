"""What a page shows of a notebook: one safe form of each output, and no more than can be read."""

import base64

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from helpers.runs.outputs import _presentable

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
PLOTLY = {"data": [], "layout": {}}
SCRIPT = '<div><script src="https://cdn.test/x.js"></script><div id="p"></div></div>'


def shown(data, metadata=None):
    output = new_output("display_data", data, metadata=metadata or {})
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[output])])
    return _presentable(notebook, "mine").cells[0].outputs[0]


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ({"application/vnd.plotly.v1+json": PLOTLY, "text/html": SCRIPT, "image/png": PIXEL}, "image/png", PIXEL),
        ({"text/html": SCRIPT, "image/svg+xml": "<svg/>"}, "text/html", "data:image/svg+xml;base64,"),
        ({"application/vnd.plotly.v1+json": PLOTLY, "text/html": SCRIPT}, "text/html", "needs scripts"),
        (
            {"application/vnd.vegalite.v5+json": {}, "text/plain": "alt.Chart(<...>)"},
            "text/html",
            "alt.Chart(&lt;...&gt;)",
        ),
        ({"application/javascript": "alert(1)", "text/plain": "<JS>"}, "text/html", "needs scripts"),
        ({"application/vnd.bokehjs_exec.v0+json": "", "text/html": "<div id=b></div>"}, "text/html", "needs scripts"),
        ({"text/html": "<style>p {}</style>", "text/plain": "<HTML>"}, "text/html", ""),
        ({"text/html": "<b>x</b>", "text/plain": "x", "image/png": PIXEL}, "text/html", "<b>x</b>"),
        ({"text/latex": "$x$", "text/plain": "x"}, "text/html", "<math"),
        ({"text/markdown": "**x**", "text/plain": "x"}, "text/html", "<strong>x</strong>"),
        ({"image/gif": PIXEL, "text/plain": "x"}, "text/html", f"data:image/gif;base64,{PIXEL}"),
        ({"image/png": '"><script>', "text/plain": "x"}, "text/plain", "x"),
        ({"application/json": {"a": 1}, "text/plain": "<JSON>"}, "text/plain", "<JSON>"),
        ({"text/plain": "x"}, "text/plain", "x"),
    ],
)
def test_the_best_safe_form_is_shown(data, kind, words):
    """F19"""
    output = shown(data)
    assert list(output.data) == [kind]
    assert words in output.data[kind]
    assert "cdn.test" not in output.data[kind]


def test_only_numbers_are_sizes():
    """D6: the exporter writes them between no quotes."""
    sizes = {"image/png": {"width": "1 onerror=x", "height": 20}, "other": "x"}
    assert shown({"image/png": PIXEL}, sizes).metadata == {"image/png": {"height": 20}}


def test_long_texts_and_large_outputs_are_cut_with_a_note():
    """F19: an error text of 300 kB, a line of 5 MB, 25 MB of outputs."""
    error = new_output("error", ename="E", evalue="x", traceback=["y" * 300_000])
    bare = new_output("error", ename="ValueError", evalue="why", traceback=[])
    line = new_output("stream", text="A" * 5_000_000 + "Z")
    parts = [new_output("display_data", {"image/png": "A" * 2_000_000}) for _ in range(12)]
    table = new_output("display_data", {"text/html": f"<b>{'x' * 2_000_000}</b>", "text/plain": "table"})
    large = new_output("display_data", {"image/png": "A" * 5_000_000, "text/plain": "x"})
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[error, bare, line, large, table, *parts])])
    first, second, third, fourth, fifth, *rest = _presentable(notebook, "mine").cells[0].outputs
    assert "250,000 characters are left out here; notebooks/mine.ipynb" in first.traceback[0]
    assert second.traceback == ["ValueError: why"]
    assert third.text.startswith("A")
    assert third.text.endswith("AZ")
    assert "4,950,001 characters are left out" in third.text
    assert "An output (image/png) of 5,000,000 characters is left out" in fourth.data["text/html"]
    assert "<pre>table</pre>" in fifth.data["text/html"]
    assert "An output (text/html) of 2,000,007 characters" in fifth.data["text/html"]
    assert sum(len(str(output)) for output in (first, third, fourth, *rest)) < 11_000_000
    assert "left out" in rest[-1].data["text/html"]


def test_a_sound_of_some_seconds_is_kept():
    sound = f'<audio controls><source src="data:audio/wav;base64,{"A" * 2_000_000}" type="audio/wav"></audio>'
    assert shown({"text/html": sound}).data["text/html"].count("A") == 2_000_000


def test_raw_and_markdown_cells_become_html():
    cells = [new_raw_cell("<b>raw</b>"), new_markdown_cell("**md** <script>x</script>")]
    notebook = _presentable(new_notebook(cells=cells), "mine")
    assert [cell.source.strip() for cell in notebook.cells] == [
        "<pre>&lt;b&gt;raw&lt;/b&gt;</pre>",
        "<p><strong>md</strong> </p>",
    ]
