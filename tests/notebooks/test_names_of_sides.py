"""What a reader sees in executed notebooks: no number is given to a side that is called falcon or llama alone.

On the laptop these are falcon-mini and SmolLM2, and a reader would take their numbers for Falcon-180B's and Llama 2's.
"""

import re
from collections.abc import Iterator

import nbformat
import pytest
from bs4 import BeautifulSoup

from helpers.base.files import ROOT

COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNS = sorted((ROOT / "runs").glob("*-laptop*"))
EXECUTED = sorted((RUNS[-1] / "notebooks").glob("*.ipynb")) if RUNS else []
# The names of recorded values end, or begin, with the side too: animal_score_falcon.
SIDE = re.compile(r"(?<![a-zA-Z0-9./-])(?:falcon|llama)(?![a-zA-Z0-9/-])")
# A model's own name: falcon-mini-chat, tiiuae/falcon-180B, Llama-2-70b-chat-hf, SmolLM2-135M-Instruct.
MODEL = re.compile(r"[\w./-]*(?:falcon-|llama-|smollm)[\w.-]+", re.IGNORECASE)
NOTEBOOKS = re.compile("|".join(path.stem for path in COMMITTED))  # one is called 04_falcon_vs_llama
BREAKS = ("tr", "div", "p", "br", "li", "summary", "h1", "h2", "h3", "h4")


def names_a_side_alone(line: str) -> bool:
    """Whether a line gives a number to a side, and no model's name says whose it is."""
    if MODEL.search(line):
        return False
    line = NOTEBOOKS.sub("", line)
    return SIDE.search(line) is not None and re.search(r"\d", line) is not None


def html_lines(source: str) -> Iterator[str]:
    """The lines that a page shows: a row of a table is one line, and a column's head stands in each of its rows."""
    page = BeautifulSoup(source, "html.parser")
    for hidden in page(["style", "script"]):
        hidden.decompose()
    for table in page("table"):
        heads = [cell.get_text(" ") for cell in table.tr("th")] if table.tr else []
        for row in table("tr")[1:]:
            for head, cell in zip(heads, row(["th", "td"]), strict=False):
                yield f"{head} {cell.get_text(' ')}"
    for tag in page(["th", "td"]):
        tag.insert_after(" ")
    for tag in page(list(BREAKS)):
        tag.insert_after("\n")
    yield from page.get_text().splitlines()


def shown_lines(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What the cells of an executed notebook show, as lines of text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                yield from html_lines("".join(data["text/html"]))
            else:
                yield from "".join(output.get("text", data.get("text/plain", ""))).splitlines()


@pytest.mark.parametrize("path", [*COMMITTED, *EXECUTED], ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_no_number_belongs_to_a_side_called_falcon_or_llama_alone(path):
    lines = list(shown_lines(nbformat.read(path, as_version=4)))
    assert lines
    assert [line for line in lines if names_a_side_alone(line)] == []


@pytest.mark.parametrize(
    ("line", "alone"),
    [
        ("falcon - llama: -0.238", True),
        ("04_falcon_vs_llama 60 s", False),
        ("llama, only a greeting: 0.611 (0.496 to 0.715)", True),
        ("only falcon right: 15", True),
        ("falcon 38 tokens/s", True),
        ("animal_score_falcon: 0.1786 | as expected", True),
        ("animal score falcon-mini-chat: 0.1786", False),
        ("falcon-mini-chat: 0.179", False),
        ("falcon  env/models/falcon-mini  13 MiB", False),  # the role beside its model
        ("SmolLM2-135M-Instruct, llama: 0.417", False),
        ("size ratio to Llama 2: 2.5", False),
        ("the real pair is falcon and llama", False),  # no number
    ],
)
def test_a_line_that_names_a_side_alone_is_told(line, alone):
    assert names_a_side_alone(line) is alone


def test_tables_are_read_by_row_and_by_column():
    by_row = "<table><tr><th></th><th>share</th></tr><tr><th>falcon</th><td>0.2</td></tr></table>"
    by_column = "<table><tr><th></th><th>llama</th></tr><tr><th>share</th><td>0.2</td></tr></table>"
    named = "<table><tr><th></th><th>falcon-mini</th></tr><tr><th>share</th><td>0.2</td></tr></table>"
    for source, found in ((by_row, True), (by_column, True), (named, False)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()])
        notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", {"text/html": source, "text/plain": "x"})]
        assert any(map(names_a_side_alone, shown_lines(notebook))) is found
