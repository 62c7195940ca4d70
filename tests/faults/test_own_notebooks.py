"""A reader's own notebooks: what is refused, what runs, what is kept and shown (part 6, F3, F4, F8, F13, F18, F19)."""

import base64
import json
import os
import shutil
import time
import warnings

import pytest
from bs4 import BeautifulSoup

from helpers import runs
from helpers.base.files import ROOT
from helpers.models import load_profile
from helpers.runs import rendering
from helpers.runs.notebook import OWN_BUDGET, _plan_own
from helpers.runs.parameters import _parse_parameters

from .judge import Fault, kept, refused, same, workbook

PIXEL = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
).decode()
PLOTLY = (
    "from IPython.display import display\n"
    "display({'application/vnd.plotly.v1+json': {'data': [], 'layout': {}}, 'text/plain': 'Figure',\n"
    "         'text/html': '<div id=p></div><script src=\"https://cdn.test/plotly.js\"></script>',\n"
    f"         'image/png': '{PIXEL}'}}, raw=True)"
)


def cell(source, tags=(), kind="code", **more):
    fields = {"cell_type": kind, "metadata": {"tags": list(tags)} if tags else {}, "source": source, **more}
    return fields | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def write(path, *cells, parameters='profile = "laptop"\nseed = 0', metadata=None):
    """A notebook as an editor writes it, without ids, with a parameters cell unless it is None."""
    tagged = [cell(parameters, ["parameters"])] if parameters is not None else []
    document = {"nbformat": 4, "nbformat_minor": 4, "metadata": metadata or {}, "cells": [*tagged, *cells]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def asked(run, *paths, parameters=(), only=(), resume=None):
    request = runs.Request(own=paths, folder=None if resume else run, parameters=parameters, only=only, resume=resume)
    return lambda: runs.run(request)


GOOD = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [cell("1")]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", ["not valid JSON"], id="P6-empty"),
        pytest.param("# %%\nprint(1)", ["not valid JSON"], id="P6-a-script"),
        pytest.param(json.dumps(GOOD)[:-20], ["not valid JSON"], id="P6-cut"),
        pytest.param("<<<<<<< HEAD\n{}", ["not valid JSON"], id="P6-merge-conflict"),
        pytest.param("[" * 100_000, ["not valid JSON"], id="P6-deep"),
        pytest.param("[]", ["is not a notebook"], id="P6-a-list"),
        pytest.param('{"a": 1}', ["is not a notebook"], id="P6-other-json"),
        pytest.param("null", ["is not a notebook"], id="P6-null"),
        pytest.param(
            json.dumps({"nbformat": 3, "worksheets": [{"cells": []}]}), ["format 3", "nbconvert"], id="P6-old"
        ),
        pytest.param(json.dumps(GOOD | {"nbformat": 5}), ["format 5"], id="P6-newer"),
        pytest.param(json.dumps(GOOD | {"cells": {}}), ["is not a notebook"], id="P6-no-cells"),
        pytest.param(json.dumps(GOOD | {"metadata": 1}), ["is not a notebook"], id="P6-no-metadata"),
        *[
            pytest.param(json.dumps(GOOD | {"cells": [cell("1"), damaged]}), ["damaged", "cell 2"], id=f"P6-{name}")
            for name, damaged in {
                "cell-null": None,
                "cell-without-source": {"cell_type": "code", "metadata": {}},
                "cell-of-no-type": {"cell_type": "x", "metadata": {}, "source": ""},
                "source-of-numbers": {"cell_type": "code", "metadata": {}, "source": [1]},
                "tags-a-text": {"cell_type": "code", "metadata": {"tags": "x"}, "source": ""},
                "metadata-a-list": {"cell_type": "code", "metadata": [], "source": ""},
                "attachments-a-list": {"cell_type": "markdown", "metadata": {}, "source": "", "attachments": [1]},
            }.items()
        ],
        *[
            pytest.param(json.dumps(GOOD | {"metadata": metadata}), words, id=f"P6-{name}")
            for name, metadata, words in [
                ("julia", {"kernelspec": {"name": "julia-1.9", "language": "julia"}}, ["julia", "Python"]),
                ("R", {"language_info": {"name": "R"}}, ["R", "Python"]),
                ("missing-kernel", {"kernelspec": {"name": "my-env", "language": "python"}}, ["'my-env'", "python3"]),
                ("kernel-a-text", {"kernelspec": "python3"}, ["kernel"]),
                *[
                    (f"budget-{seconds}", {"workbook": {"budget": {"seconds": seconds}}}, ["budget", "above 0"])
                    for seconds in (0, -1, float("inf"), float("nan"), "60", True, None, [1])
                ],
                ("budget-a-number", {"workbook": {"budget": 60}}, ["budget", "seconds"]),
                ("budget-unknown", {"workbook": {"budget": {"seconds": 1, "minutes": 1}}}, ["budget"]),
                ("models-unknown", {"workbook": {"models": {"gpt": ["bf16"]}}}, ["gpt"]),
                ("limits-of-nothing", {"workbook": {"parameters": {"x": {"least": 1}}}}, ["'x'"]),
            ]
        ],
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path, content, words):
    path = tmp_path / "mine.ipynb"
    path.write_text(content, encoding="utf-8")
    refused(asked(tmp_path / "run", path), "mine.ipynb", *words)
    same((tmp_path / "run").exists(), False)
    kept(path, content.encode())


def test_p6_a_file_of_another_encoding_is_refused(tmp_path):
    for encoding in ("utf-16", "utf-8-sig", "latin-1"):
        path = tmp_path / "mine.ipynb"
        path.write_bytes(json.dumps(GOOD | {"cells": [cell("'ä'")]}, ensure_ascii=False).encode(encoding))
        refused(asked(tmp_path / "run", path), "mine.ipynb", "not valid JSON")


def test_p6_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.ipynb").mkdir()
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "link.ipynb").symlink_to(tmp_path / "nowhere")
    refused(asked(tmp_path / "run", tmp_path / "folder.ipynb"), "is not a file")
    refused(asked(tmp_path / "run", tmp_path / "pipe.ipynb"), "is not a file")
    for name in ("gone", "link"):
        refused(asked(tmp_path / "run", tmp_path / f"{name}.ipynb"), "does not exist")


def test_p6_two_notebooks_of_one_name_are_refused(tmp_path):
    paths = [write(tmp_path / folder / name) for folder, name in (("a", "x.ipynb"), ("b", "x.ipynb"), ("c", "X.ipynb"))]
    refused(asked(tmp_path / "run", paths[0], paths[1]), "same name")
    refused(asked(tmp_path / "run", paths[0], paths[2]), "same name")
    refused(asked(tmp_path / "run", paths[0], paths[0]), "same name")


def test_p6_a_name_that_cannot_be_shown_is_refused(tmp_path):
    refused(asked(tmp_path / "run", write(tmp_path / "a\x1b[2J.ipynb")), "Rename")
    refused(asked(tmp_path / "run", write(tmp_path / "a\nb.ipynb")), "Rename")


@pytest.mark.parametrize(
    ("cells", "given", "words"),
    [
        pytest.param([], ["-p"], ["name=value"], id="P6-no-value"),
        pytest.param([], ["sed=1"], ["'sed'", "seed"], id="P6-unknown"),
        pytest.param([], ["seed=1:30"], ["seed"], id="P6-type"),
        pytest.param([], [f"seed={2**63}"], ["seed", str(2**63 - 1)], id="P6-64-bits"),
        pytest.param([], ["profile=8x80gb"], ["--profile"], id="P6-profile"),
        pytest.param([cell("a = 1", ["parameters"])], [], ["exactly one", "2"], id="P6-two-parameter-cells"),
    ],
)
def test_parameters_of_an_own_notebook_are_checked(tmp_path, cells, given, words):
    refused(asked(tmp_path / "run", write(tmp_path / "mine.ipynb", *cells), parameters=given), *words)


def test_p6_parameters_without_a_cell_for_them_and_options_that_contradict_are_refused(tmp_path):
    bare = write(tmp_path / "mine.ipynb", parameters=None)
    refused(asked(tmp_path / "run", bare, parameters=["seed=1"]), "'seed'", "tagged 'parameters'")
    refused(asked(tmp_path / "run", bare, only=["01"]), "--only", "--notebook")
    broken = write(tmp_path / "broken.ipynb", parameters="seed = ")
    refused(asked(tmp_path / "run", broken), "broken.ipynb", "not valid Python")


def test_p6_without_parameters_budget_or_models_the_defaults_are_said(tmp_path):
    path = write(tmp_path / "mine.ipynb", parameters=None)
    (plan,) = _plan_own(load_profile("laptop"), [path], {}, {})
    same((plan.budget, plan.given, plan.models), (OWN_BUDGET, {}, None))
    for words in (str(path), "no cell tagged 'parameters'", f"{OWN_BUDGET.seconds:g} s"):
        if words not in plan.remark:
            raise Fault("wrong", f"{words!r} is not said: {plan.remark}")


def test_p6_f13_what_editors_write_is_read(tmp_path):
    """Magics in the parameters cell, null for no tags, sources as lists, computed defaults."""
    source = "%load_ext autoreload\n!ls\nseed: int = 3\nout = str(seed)\nlimit = -2\nword = 'x' * 3\nsize = (1, 2)"
    tags = cell("1") | {"metadata": {"tags": None}}
    path = write(tmp_path / "mine.ipynb", tags, parameters=source.splitlines(keepends=True))
    raw = _parse_parameters(["seed=4", "limit=-3", "size=[3, 4]"])
    (plan,) = _plan_own(load_profile("laptop"), [path], raw, {})
    same(plan.given, {"seed": 4, "limit": -3, "size": (3, 4)})


def test_p6_a_declared_budget_and_limits_hold(tmp_path):
    declared = {"workbook": {"budget": {"seconds": 7}, "parameters": {"seed": {"least": 0}}, "models": {}}}
    path = write(tmp_path / "mine.ipynb", metadata=declared)
    (plan,) = _plan_own(load_profile("laptop"), [path], {}, {})
    same((plan.budget.seconds, plan.budget.cell_seconds, plan.models), (7, 7, ()))
    refused(asked(tmp_path / "run", path, parameters=["seed=-1"]), "seed", "from 0")


@pytest.mark.whole
def test_p6_f4_f8_f19_the_notebook_that_must_pass(tmp_path):
    """interact, Output, skip-execution, attachments, plotly, an equation, an error that is meant, a line of 5 MB."""
    text = "# Mine\n\n$x^2$ ![here](attachment:a.png) ![gone](attachment:b.png) ![beside](beside.png)"
    path = write(
        tmp_path / "lab" / "mine.ipynb",
        cell(text, kind="markdown", attachments={"a.png": {"image/png": PIXEL}}),
        cell("from ipywidgets import interact\nimport ipywidgets as widgets\ninteract(lambda x: x, x=3)"),
        cell("with widgets.Output(): print('captured', 6 * 7)"),
        cell("raise SystemError('never')", ["skip-execution"]),
        cell("raise ValueError('as tagged')", ["raises-exception"]),
        cell(""),
        cell("raw", kind="raw"),
        cell(PLOTLY),
        cell("from IPython.display import Math\nMath(r'\\frac{a}{b}')"),
        cell("print('A' * 5_000_000)"),
        cell("import os\nprint('in', os.getcwd(), repr(text))"),
        parameters="text = 'x'",
    )
    (tmp_path / "lab" / "beside.png").write_bytes(base64.b64decode(PIXEL))
    original, given = path.read_bytes(), 'Rate C #1 please: "it\'s\\n" {a}'
    began = time.monotonic()
    outcome = workbook("run", "--notebook", path, "-p", f"text={given}", "--folder", tmp_path / "run")
    outcome.ends(0, "passed mine", f"mine is {path}", "3600 s")
    kept(path, original)
    page = (tmp_path / "run" / "html" / "mine.html").read_text(encoding="utf-8")
    soup = BeautifulSoup(page, "html.parser")
    shown = soup.get_text()
    for words in ("captured 42", "as tagged", "picture gone is not in this notebook", "characters are left out here"):
        if words not in shown:
            raise Fault("lost", f"{words!r} is not on the page")
    for words in (f"in {tmp_path / 'lab'} {given!r}",):
        if words not in shown:
            raise Fault("wrong", f"{words!r} is not on the page")
    same(len(soup.find_all("math")), 2)
    same([image["src"] for image in soup("img")], [f"data:image/png;base64,{PIXEL}"] * 3)
    same("cdn.test" in page.replace("cdn.test/plotly.js\\&quot;", ""), "cdn.test" in shown)
    if len(page) > 1_000_000:
        raise Fault("wrong", f"the page has {len(page):,} characters")
    # Twenty seconds on a quiet machine; this one may be shared by many.
    same(time.monotonic() - began < 60, True)


@pytest.mark.whole
def test_p6_a_run_of_own_notebooks_is_resumed(tmp_path):
    """What passed and did not change is kept, wherever it lies now; a notebook that is gone is named."""
    first, second = write(tmp_path / "a" / "01_loading.ipynb", cell("1")), tmp_path / "a" / "second.ipynb"
    write(second, cell("1 / 0"))
    run = tmp_path / "run"
    workbook("run", "--notebook", first, "--notebook", second, "--folder", run).ends(1, "passed 01_loading", "FAILED")
    started = json.loads((run / "status.json").read_text())["notebooks"]["01_loading"]["started"]
    second.unlink()
    workbook("run", "--resume", run).ends(2, str(second), "not there any more", "--notebook")
    moved = write(tmp_path / "b" / "second.ipynb", cell("2"))
    workbook("run", "--resume", run, "--notebook", moved).ends(0, "passed 01_loading", "passed second")
    same(json.loads((run / "status.json").read_text())["notebooks"]["01_loading"]["started"], started)
    workbook("run", "--resume", run, "--notebook", write(tmp_path / "third.ipynb")).ends(2, "'third'", "new run")
    # Of the name of one of the workbook's, it is not judged by that one's values.
    workbook("check", run).ends(2, "your own notebooks")
    workbook("expect", run).ends(2, "your own notebooks")
    refused(lambda: runs.run(runs.Request(resume=run, only=["7"])), "'7'")


@pytest.mark.whole
def test_p6_a_budget_of_its_own_ends_a_notebook(tmp_path):
    declared = {"workbook": {"budget": {"seconds": 60, "cell_seconds": 1}}}
    path = write(tmp_path / "mine.ipynb", cell("import time\ntime.sleep(100)"), metadata=declared)
    workbook("run", "--notebook", path, "--folder", tmp_path / "run").ends(1, "ran past its 1 s budget")


@pytest.mark.whole
def test_f18_expected_values_are_found_outside_of_the_runner(tmp_path):
    """papermill runs a copy of 00 under another name, elsewhere: the values have their expected ones."""
    source = ROOT / "notebooks" / "00_start_here.ipynb"
    document = json.loads(source.read_text(encoding="utf-8"))
    # The first cells, and one that records a value that is computed there.
    cells = [each for each in document["cells"] if each["cell_type"] == "code"][:2]
    text = "".join((ROOT / "notebooks" / "source" / "00_start_here.py").read_text(encoding="utf-8"))
    name = next(line for line in text.splitlines() if line.startswith("notebook_name = "))
    expected = json.loads((ROOT / "notebooks" / "expected" / "laptop.json").read_text(encoding="utf-8"))
    key, entry = next((k, v) for k, v in expected.items() if k.startswith("00_start_here/"))
    value = f"runs.record({key.partition('/')[2]!r}, {entry['value']!r})"
    copy = tmp_path / "Untitled.ipynb"
    copy.write_text(json.dumps(document | {"cells": [*cells, cell(name), cell(value)]}), encoding="utf-8")
    import papermill

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = papermill.execute_notebook(
            copy, None, {"seed": 1}, progress_bar=False, cwd=tmp_path, kernel_name="python3"
        )
    shown = "".join(done.cells[-1].outputs[0].data["text/plain"])
    if "as expected" not in shown:
        raise Fault("wrong", shown)


@pytest.mark.whole
def test_f18_papermill_reads_the_parameters_of_all_notebooks(tmp_path):
    import nbformat
    import papermill

    from helpers.runs.parameters import _declared_parameters

    for source in sorted((ROOT / "notebooks" / "source").glob("*.py")):
        notebook = rendering._source_notebook(source)
        declared = list(_declared_parameters(notebook, source.stem))
        nbformat.write(notebook, tmp_path / f"{source.stem}.ipynb")
        same(list(papermill.inspect_notebook(tmp_path / f"{source.stem}.ipynb")), declared)


def test_f14_rendering_refuses_to_erase_what_only_a_notebook_has(tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copy(ROOT / "notebooks" / "source" / "00_start_here.py", tmp_path / "source")
    (path,) = rendering._sync(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))

    def edited(change):
        copy = json.loads(json.dumps(document))
        change(copy["cells"])
        path.write_text(json.dumps(copy), encoding="utf-8")
        before = path.read_bytes()
        refused(lambda: rendering._sync(tmp_path), "00_start_here.ipynb", "source/00_start_here.py")
        kept(path, before)

    edited(lambda cells: cells.insert(3, cell("print('mine')", id="added")))
    edited(lambda cells: cells[1].update(source="# mine"))
    edited(lambda cells: cells[0].update(attachments={"a.png": {"image/png": PIXEL}}))
    edited(lambda cells: cells.append(cell("a note", kind="markdown", id="note")))
    path.write_text("{half", encoding="utf-8")
    refused(lambda: rendering._sync(tmp_path), "not a whole notebook")
    kept(path, b"{half")
    # A source that changed since is no edit of the notebook.
    path.write_text(json.dumps(document), encoding="utf-8")
    source = tmp_path / "source" / "00_start_here.py"
    source.write_text(
        source.read_text(encoding="utf-8").replace("# **You will learn**", "# You learn"), encoding="utf-8"
    )
    rendering._sync(tmp_path)
