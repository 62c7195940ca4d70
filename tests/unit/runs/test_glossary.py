"""The glossary of a run: copied beside the executed notebooks, and a page to which theirs link."""

import re

import nbformat
from nbformat import v4

from helpers.base.files import ROOT
from helpers.runs import folder, pages

TEXT = "The [KV cache](GLOSSARY.md#kv-cache) grows; see the [glossary](GLOSSARY.md)."


def made(tmp_path, *, kept):
    """The page of a notebook that links to the glossary, in a run that kept it or not."""
    (tmp_path / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell(TEXT)]), tmp_path / "notebooks" / "00_a.ipynb")
    if kept:
        folder._keep_glossary(tmp_path, ROOT / "notebooks" / "00_start_here.ipynb")
    written, problems = pages._write_pages(tmp_path, ["00_a"])
    assert problems == []
    return (tmp_path / written["00_a"]).read_text(encoding="utf-8")


def test_the_pages_of_a_run_link_to_its_own_glossary(tmp_path):
    page = made(tmp_path, kept=True)
    assert '<a href="GLOSSARY.html#kv-cache">KV cache</a>' in page
    glossary = (tmp_path / "html" / "GLOSSARY.html").read_text(encoding="utf-8")
    assert glossary.count('id="kv-cache"') == 1
    # Every entry of the file keeps its anchor through the cleaning.
    anchors = re.findall(r'<a id="([^"]+)">', (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8"))
    assert [anchor for anchor in anchors if f'id="{anchor}"' not in glossary] == []
    assert "as executed" not in glossary
    # No notebook of that name ran, so its links lead to the report.
    assert 'href="../report.html#notebooks">Notebook 01' in glossary


def test_a_run_without_a_glossary_shows_the_words_alone(tmp_path):
    page = made(tmp_path, kept=False)
    assert "The KV cache grows; see the glossary." in page
    assert not (tmp_path / "html" / "GLOSSARY.html").exists()


def test_a_notebook_without_a_glossary_beside_it_is_no_error(tmp_path):
    folder._keep_glossary(tmp_path, tmp_path / "mine.ipynb")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_that_name_that_is_no_text_does_not_stop_a_run(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "GLOSSARY.md").write_bytes(b"\xff\xfe no UTF-8")
    (tmp_path / "notebooks").mkdir()
    folder._keep_glossary(tmp_path, tmp_path / "mine" / "mine.ipynb")
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell(TEXT)]), tmp_path / "notebooks" / "mine.ipynb")
    written, problems = pages._write_pages(tmp_path, ["mine"])
    assert list(written) == ["mine"]
    assert len(problems) == 1
    assert problems[0].startswith("The page of GLOSSARY cannot be made")
    assert "The KV cache grows" in (tmp_path / "html" / "mine.html").read_text(encoding="utf-8")
