"""What a reader leans on: the glossary, the way to the next notebook, goals with their answers, drawings, times."""

import ast
import re

import jupytext
import pytest

from helpers.base.files import ROOT

FOLDER = ROOT / "notebooks"
SOURCES = sorted((FOLDER / "source").glob("*.py"))
GLOSSARY = (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r'^<a id="([^"]+)"></a>\*\*(.+?)\.?\*\*', GLOSSARY, re.MULTILINE))
LINK = re.compile(r"\[([^\]]+)\]\(GLOSSARY\.md#([\w-]+)\)")
DRAWINGS = {"shared_heads": "00", "decoder_layer": "01", "quantization_grids": "02"}
DRAWINGS |= {"lora_and_qlora": "05", "loss_tokens": "05"}


def cells(path):
    return jupytext.read(path)["cells"]


def texts(path):
    return [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]


def prose(path):
    """The text between the header and the exercises, without headings, tables and code."""
    text = "\n\n".join(texts(path)[1:]).partition("## Exercises")[0]
    text = re.sub(r"^(#|\||<).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def test_every_link_has_its_entry_and_every_entry_a_link():
    linked = {anchor for path in SOURCES for text in texts(path) for _, anchor in LINK.findall(text)}
    assert linked == set(ENTRIES)
    assert len(ENTRIES) == len(re.findall(r'<a id="', GLOSSARY))


def test_the_glossary_is_in_order_and_sends_to_notebooks_that_exist():
    names = [name.lower() for name in ENTRIES.values()]
    assert names == sorted(names)
    targets = set(re.findall(r"\]\((\w+)\.ipynb\)", GLOSSARY))
    assert targets <= {path.stem for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_word_of_the_glossary_is_linked_where_a_notebook_first_uses_it(path):
    text = prose(path)
    for anchor, name in ENTRIES.items():
        uses = [(name, found) for found in re.finditer(rf"(?<![\w\[-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE)]
        link = re.search(rf"\[[^\]]+\]\(GLOSSARY\.md#{anchor}\)", text)
        if not uses:
            continue
        assert link, f"Link the first use in {path.stem}: [{name}](GLOSSARY.md#{anchor})"
        outside = [found.start() for _, found in uses if not _in_a_link(text, found.start())]
        first = min(outside, default=link.start())
        assert link.start() <= first, (
            f"{path.stem} uses {name!r} before the link: {text[max(0, first - 40) : first + 40]}"
        )


def _in_a_link(text, position):
    return any(found.start() <= position < found.end() for found in re.finditer(r"\[[^\]]*\]\([^)]*\)", text))


NEIGHBOURS = list(zip([None, *SOURCES[:-1]], SOURCES, [*SOURCES[1:], None], strict=True))


@pytest.mark.parametrize(("before", "path", "after"), NEIGHBOURS)
def test_the_way_on_stands_at_the_top_and_at_the_bottom(before, path, after):
    first, *_, last = texts(path)
    assert cells(path)[-1]["source"] == last
    for text in (first, last):
        assert before is None or re.search(rf"\*\*Before:\*\* \[[^\]]+\]\({before.stem}\.ipynb\)", text)
        assert after is None or re.search(rf"\*\*Next:\*\* \[[^\]]+\]\({after.stem}\.ipynb\)", text)
        assert "[Glossary](GLOSSARY.md)" in text
    assert first.endswith(last)


def test_times_stand_in_the_profile_alone():
    """Notebook 00 shows them, the report shows those of its run; none is typed into a header or the README's table."""
    spent = re.compile(r"\b\d+ ?(s|min|seconds|minutes)\b|\| (many )?(minutes|hours)")
    for path in SOURCES:
        assert not spent.search(texts(path)[0]), path.stem
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if re.match(r"\| \[\d\d ", line)]
    assert len(rows) == len(SOURCES)
    assert [row for row in rows if spent.search(row)] == []
    assert any("models.times(settings)" in cell["source"] for cell in cells(SOURCES[0]))


@pytest.mark.parametrize("path", SOURCES[1:4], ids=lambda p: p.stem)
def test_every_goal_is_answered_at_the_end_with_numbers_of_the_run(path):
    goals = re.findall(r"^- ", texts(path)[0].partition("**You will learn**")[2], re.MULTILINE)
    whole = cells(path)
    heading = next(n for n, cell in enumerate(whole) if "## What you saw" in cell["source"])
    lists = [node for node in ast.walk(ast.parse(whole[heading + 1]["source"])) if isinstance(node, ast.Assign)]
    (answers,) = [node.value for node in lists if getattr(node.targets[0], "id", "") == "answers"]
    assert len(answers.elts) == len(goals)
    for answer in answers.elts:
        assert any(isinstance(part, ast.FormattedValue) for part in ast.walk(answer)), ast.unparse(answer)


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_shown_where_the_thing_is_taught(name):
    (path,) = [path for path in SOURCES if path.stem.startswith(DRAWINGS[name])]
    assert any(f"figures.{name}(" in cell["source"] for cell in cells(path) if cell["cell_type"] == "code")


def test_section_8_of_notebook_01_promises_what_it_shows():
    (path,) = [path for path in SOURCES if path.stem.startswith("01")]
    headings = re.findall(r"^## 8 · (.+)$", "\n".join(texts(path)), re.MULTILINE)
    assert headings == ["Fewer passes, the same text"]
    code = "\n".join(cell["source"] for cell in cells(path) if cell["cell_type"] == "code")
    assert '"passes saved"' in code
    assert 'f"passes_saved_' in code
