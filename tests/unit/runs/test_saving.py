"""The executed notebook as it is saved: streams merged in their order, widgets replaced, in linear time."""

import json
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.runs.capturing import _Widgets
from helpers.runs.saving import _Document

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(display):
    return new_output("display_data", data={"text/plain": display})


def saved(*outputs):
    """The outputs of one cell as they are saved, in short."""
    notebook = new_notebook(cells=[new_code_cell("x", outputs=list(outputs))])
    return short(json.loads(_Document(()).text(notebook))["cells"][0]["outputs"])


def short(outputs):
    parts = []
    for output in outputs:
        if output["output_type"] == "stream":
            parts.append((output["name"], "".join(output["text"])))
        elif output["output_type"] == "error":
            parts.append(("error", output["evalue"]))
        else:
            parts.append(("data", "".join(output["data"]["text/plain"])))
    return parts


def test_a_saved_notebook_is_what_nbformat_would_write():
    outputs = [stream("a\nb\n"), shown("c\nd"), new_output("error", ename="E", evalue="é", traceback=["x\ny"])]
    cells = [new_markdown_cell("# é\n- 東京"), new_code_cell("x\ny", outputs=outputs), new_code_cell("")]
    for content in (cells, []):
        notebook = new_notebook(cells=content, metadata={"workbook": {"models": {}}, "cells": []})
        assert _Document(()).text(notebook) == nbformat.writes(notebook) + "\n"


def test_outputs_keep_their_order():
    """F10: print, display, print; nbclient's merging would move the second print before the display."""
    assert saved(stream("1\n"), shown("2"), stream("3\n"), stream("4\n"), stream("5", "stderr"), stream("6")) == [
        ("stdout", "1\n"), ("data", "2"), ("stdout", "3\n4\n"), ("stderr", "5"), ("stdout", "6"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1%\r50%\r100%\n", "100%\n"),
        ("1%\r50%\r", "50%\r"),
        ("a\r\nb\r\n", "a\r\nb\r\n"),
        ("x\ny\rz", "x\nz"),
        ("a\rb\r\n", "b\r\n"),
        ("\r", "\r"),
        ("", ""),
    ],
)
def test_a_line_is_as_a_terminal_leaves_it(text, right):
    assert saved(*(stream(character) for character in text)) == ([("stdout", right)] if text else [])


def test_a_token_in_two_pieces_is_hidden():
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[stream(TOKEN[:9]), stream(TOKEN[9:])])])
    assert "[redacted]" in _Document(()).text(notebook)


def test_a_cell_that_changes_later_is_written_again():
    """nbclient exchanges the data of a display that a later cell updates."""
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[shown("first")]), new_code_cell("y")])
    document = _Document(())
    assert "first" in document.text(notebook)
    notebook.cells[0].outputs[0]["data"] = {"text/plain": "second"}
    assert "second" in document.text(notebook)
    notebook.cells[1].outputs = [new_output("error", ename="KernelDied", evalue="died", traceback=[])]
    assert "died" in document.text(notebook)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda size: [stream("A" * size)],
        lambda size: [stream("A\n") for _ in range(size // 50)],
        lambda size: [stream("\r50%" * (size // 4))],
        lambda size: [shown("<p>x</p>" * (size // 8))],
    ],
    ids=["one line", "many prints", "progress", "display"],
)
def test_saving_takes_linear_time(outputs):
    """E6, F10: nbclient's merging took 46 s for a line of 400,000 letters."""

    def seconds(size):
        notebook = new_notebook(cells=[new_code_cell("x", outputs=outputs(size))])
        begun = time.process_time()
        _Document(("Zx81kQ0pLmN3vB7t",)).text(notebook)
        return time.process_time() - begun

    assert seconds(1_600_000) < 10 * max(seconds(400_000), 0.02)


def test_a_large_output_is_redacted_once_and_not_after_each_cell():
    large = new_code_cell("x", outputs=[shown("the quick brown fox " * 200_000)])
    cells = [large, *(new_code_cell("y") for _ in range(30))]
    notebook, document = new_notebook(cells=cells), _Document(())
    begun = time.process_time()
    document.text(notebook)
    first = time.process_time() - begun
    for cell in notebook.cells[1:]:
        cell.outputs = [stream("done")]
        document.text(notebook)
    assert time.process_time() - begun < 8 * first


# --- output widgets, with a real kernel -------------------------------------------------------------------------------

WIDGETS = [
    "import ipywidgets as w\nfrom IPython.display import display\nw.interact(lambda x: print('got', x), x=3);",
    "with w.Output():\n    print('never shown')",
    "out, inner = w.Output(), w.Output()\nprint('before')\n"
    "display(w.VBox([w.IntSlider(), w.HBox([out])]))\nprint('after')",
    "with out:\n    print('inside')\n    handle = display('first', display_id=True)\n    display(inner)",
    "with inner:\n    print('deep')\nhandle.update('second')",
    "print(len(out.outputs), out.outputs[0]['text'].strip())",
    "other, none = w.Output(), (None, None, None)\n"
    "other.__enter__()\nout.__enter__()\nother.__exit__(*none)\nout.__exit__(*none)",
    "gone = w.Output()\nwith gone:\n    print('forgotten')\n    gone.clear_output()\n    print('kept')",
    "late = w.Output()\nlate.append_stdout('appended')\nlate",
    "with w.Output():\n    1 / 0",
]


@pytest.fixture(scope="module")
def widgets_notebook():
    document = _Document(())
    notebook = new_notebook(cells=[new_code_cell(source) for source in WIDGETS])
    client = NotebookClient(notebook, store_widget_state=True, allow_errors=True, timeout=60)
    client.widget_registry = document.widgets.registry()
    client.execute()
    text = document.text(notebook)
    nbformat.validate(nbformat.reads(text, as_version=4))
    return [short(cell["outputs"]) for cell in json.loads(text)["cells"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "right"),
    [
        (0, [("stdout", "got 3\n")]),
        (1, [("stdout", "never shown\n")]),
        (2, [("stdout", "before\ninside\n"), ("data", "'second'"), ("stdout", "deep\nafter\n")]),
        (3, []),
        (4, []),
        (5, [("stdout", "3 inside\n")]),
        (6, []),
        (7, [("stdout", "kept\n")]),
        (8, [("stdout", "appended")]),
        (9, [("error", "division by zero")]),
    ],
    ids=["interact", "not shown", "in a box", "shown elsewhere", "nested", "the kernel knows", "crossed", "cleared",
         "appended", "error"],
)  # fmt: skip
def test_what_a_widget_captured_is_in_the_notebook(widgets_notebook, cell, right):
    """F4: these ended the run with KeyError, or were lost."""
    assert widgets_notebook[cell] == right


def test_a_widget_that_shows_itself_is_shown_once():
    widgets = _Widgets(states={"a": {"children": ["IPY_MODEL_b"]}, "b": {"children": ["IPY_MODEL_a"]}})
    assert list(widgets.within("a")) == []
