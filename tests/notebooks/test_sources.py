"""Rules that every notebook keeps, and the agreement of each notebook with its source."""

import ast
import json
import re

import jupytext
import nbformat
import pytest

from helpers.base.files import ROOT
from helpers.base.hashes import file_hash
from helpers.models import load_profile
from helpers.runs import rendering
from helpers.runs.document import _cells_hash
from helpers.runs.notebook import _declared_models

SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))
NOTEBOOKS = [ROOT / "notebooks" / f"{path.stem}.ipynb" for path in SOURCES]
MOST_LINES = 14


def source_cells(path, kind):
    return [c for c in jupytext.read(path)["cells"] if c["cell_type"] == kind]


def test_the_notebooks_are_those_of_the_sources():
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS
    assert [path.stem[:2] for path in SOURCES] == [f"{i:02}" for i in range(len(SOURCES))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_cells_are_short_and_parameters_are_literals(path):
    code = source_cells(path, "code")
    for cell in code:
        assert len(cell["source"].splitlines()) <= MOST_LINES, cell["source"]
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0]["source"]).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_every_notebook_has_its_parts(path):
    text = "\n".join(c["source"] for c in source_cells(path, "markdown"))
    assert text.startswith(f"# {path.stem[:2]} · ")
    for heading in ("**You will learn**", "## What you saw", "## Exercises"):
        assert heading in text
    first_table = source_cells(path, "code")[1]["source"]
    assert "models.table(settings)" in first_table


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_rendered_from_its_source(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    source = rendering._source_notebook(ROOT / "notebooks" / "source" / f"{path.stem}.py")
    assert _cells_hash(notebook) == _cells_hash(source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_clean(path):
    notebook, text = nbformat.read(path, as_version=4), path.read_text(encoding="utf-8")
    assert "papermill" not in notebook["metadata"]
    assert "widgets" not in notebook["metadata"]
    assert "widget-view+json" not in text
    assert not any("injected-parameters" in c["metadata"].get("tags", []) for c in notebook["cells"])
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp)/", text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and cell["source"]:
            assert cell["execution_count"], f"never run: {cell['source'][:60]}"
            assert not any(o["output_type"] == "error" for o in cell["outputs"])
            warnings = [o["text"] for o in cell["outputs"] if o.get("name") == "stderr"]
            # The warnings that notebook 02 talks about.
            assert all("eetq" in text or "torch_dtype" in text for text in warnings), warnings


def newest_whole_run():
    """The newest finished run of the laptop profile in runs/ that ran the notebooks as they are now, or None."""
    for folder in sorted((ROOT / "runs").glob("*-laptop*"), reverse=True):
        files = [folder / "manifest.json", folder / "status.json"]
        if not all(file.exists() for file in files):
            continue
        manifest, status = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        current = {path.stem: file_hash(path) for path in NOTEBOOKS}
        ran = {name: entry["sha256"] for name, entry in manifest["notebooks"].items()}
        passed = all(entry["status"] == "passed" for entry in status["notebooks"].values())
        if ran == current and passed and "loaded" in manifest:
            return manifest
    return None


def test_the_notebooks_declare_what_a_run_loaded_and_nothing_else():
    """``workbook run`` fails a notebook that loads too much; here: that nothing is declared, and fetched, in vain."""
    manifest, laptop = newest_whole_run(), load_profile("laptop")
    if manifest is None:
        pytest.skip("runs/ holds no finished run of these notebooks: make run")
    for path in NOTEBOOKS:
        models = _declared_models(json.loads(path.read_text(encoding="utf-8")), laptop, path.stem)
        declared = {model.ref.id for model in models}
        entries = [entry for entry in manifest["loaded"] if entry["notebook"] == path.stem and not entry["made_here"]]
        assert {entry["model"] for entry in entries} == declared, path.stem
        for entry in entries:
            fitting = [model.precisions for model in models if model.ref.id == entry["model"]]
            assert any(entry["precision"] in precisions for precisions in fitting), entry
