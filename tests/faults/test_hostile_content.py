"""Hostile content: what outputs, values and names hold is shown as text, runs nowhere, and leads nowhere."""

import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat import v4
from rich.table import Table

from helpers.base.terminal import Terminal
from helpers.base.text import shell_word
from helpers.runs.folder import _held
from helpers.runs.report import write_report
from helpers.runs.saving import _Document
from tests.unit.runs.test_report import make_run, run  # noqa: F401 (a fixture)

from .judge import Fault, kept, not_executed, refused, same, workbook
from .test_secrets import own_notebook

SEQUENCES = {
    "title": "\x1b]0;owned\x07", "clear": "\x1b[2J\x1b[H", "c1": "\x9b2J", "dcs": "\x1bP1;2|x\x1b\\",
    "clipboard": "\x1b]52;c;eA==\x07", "return": "passed\rFAILED", "bidi": "\u202egnp.exe", "bell": "\x07\x08",
    "link": "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\", "surrogate": "\udc9b",
}  # fmt: skip
MARKUP = {"bold": "[bold]x[/bold]", "closing": "[/x]", "link": "[link=http://evil]x[/link]", "emoji": ":skull:"}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def silent(screen):
    """Judge that nothing on a screen is more than text."""
    if found := CONTROL.search(screen):
        raise Fault("execution", f"{found.group()!r} reached the terminal")


# --- D3: terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=[f"D3-{name}" for name in SEQUENCES])
@pytest.mark.parametrize("place", ["reason", "value", "folder"])
def test_a_sequence_of_a_run_does_not_reach_the_terminal(run, sequence, place, tmp_path, monkeypatch):  # noqa: F811
    from typer.testing import CliRunner

    from helpers.cli import app
    from helpers.runs import execution

    # "expect" writes into this folder, which must not be the checkout's own
    (tmp_path / "notebooks" / "expected").mkdir(parents=True)
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path / "notebooks")
    hostile, command = f"a{sequence}b", "check"
    if place == "folder":
        run, command = run.rename(tmp_path / hostile.replace("/", "")), "expect"
    else:
        names = {"reason": ("status.json", "notebooks", "01_b", "reason"),
                 "value": ("results.json", "values", "00_a", "compute", "value")}[place]  # fmt: skip
        content = inner = json.loads((run / names[0]).read_text())
        for name in names[1:-1]:
            inner = inner[name]
        inner[names[-1]] = hostile
        (run / names[0]).write_text(json.dumps(content))
        command = "diff"
    arguments = [run, run, "--html", tmp_path / "diff.html"] if command == "diff" else [run]
    silent(CliRunner().invoke(app, [command, *map(str, arguments)]).output)


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=[f"D3-usage-{name}" for name in SEQUENCES])
def test_a_sequence_in_a_wrong_call_does_not_reach_the_terminal(sequence):
    from typer.testing import CliRunner

    from helpers.cli import app

    for arguments in ([f"a{sequence}b"], ["run", f"--a{sequence}b"], ["run", "--only", "00", f"a{sequence}b"]):
        result = CliRunner().invoke(app, arguments)
        same(result.exit_code, 2)
        silent(result.output)


@pytest.mark.parametrize(
    "sequence",
    # No file holds a half of a surrogate pair.
    [pytest.param(sequence, id=f"D3-page-{name}") for name, sequence in SEQUENCES.items() if name != "surrogate"],
)
def test_a_sequence_is_seen_on_a_page(run, sequence):  # noqa: F811
    """A page must neither hide it nor turn what follows."""
    results = json.loads((run / "results.json").read_text())
    results["values"]["00_a"][f"a{sequence}b"] = results["values"]["00_a"]["compute"] | {"value": f"c{sequence}d"}
    (run / "results.json").write_text(json.dumps(results))
    hostile = f"e{sequence}f"
    outputs = [v4.new_output("stream", text=hostile),
               v4.new_output("display_data", data={"text/html": f"<p>{hostile}"}),
               v4.new_output("error", ename="E", evalue=hostile, traceback=[hostile])]  # fmt: skip
    cells = [v4.new_markdown_cell(hostile), v4.new_code_cell(f"'{hostile}'", outputs=outputs)]
    (run / "notebooks").mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), run / "notebooks" / "00_a.ipynb")
    write_report(run)
    for page in (run / "report.html", run / "html" / "00_a.html"):
        silent(page.read_text().replace("\r", ""))


@pytest.mark.parametrize("markup", MARKUP.values(), ids=[f"D3-markup-{name}" for name in MARKUP])
def test_markup_is_shown_as_it_is(markup, capsys):
    table = Table("a", title=markup)
    table.add_row(markup)
    Terminal().print(markup, table)
    same(capsys.readouterr().out.count(markup), 3)


# --- D4: printed commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a'; touch canary; '", id="D4-quote"),
        pytest.param("$(touch canary)", id="D4-substitution"),
        pytest.param("`touch canary`", id="D4-backtick"),
        pytest.param("a b & touch canary", id="D4-space"),
        pytest.param("a\ntouch canary\n", id="D4-line"),
        pytest.param("\x1b]0;x\x07'$(touch canary)", id="D4-escape"),
        pytest.param("-rf", id="D4-option"),
    ],
)
def test_a_pasted_command_does_what_it_says(name, tmp_path):
    (tmp_path / name).mkdir()
    command = f"cd -- {shell_word(name)} && pwd"
    silent(command)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    not_executed(tmp_path / "canary")
    same(done.stdout, f"{tmp_path / name}\n".encode())


@pytest.mark.whole
def test_d4_the_command_that_a_failed_run_prints_resumes_it(tmp_path):
    """The printed line, in a shell; the canary is what the name of the folder would make."""
    notebook = own_notebook(tmp_path / "own", "raise ValueError('\\x1b]0;owned\\x07 [bold]x[/bold] \\x9b2J')")
    outcome = workbook("run", "--notebook", notebook, "--folder", tmp_path / "r'; touch canary; '\x1b[2J")
    outcome.ends(1, "FAILED")
    silent(outcome.screen)
    (line,) = [line for line in outcome.screen.splitlines() if "run --resume" in line]
    arguments = line.partition("run --resume ")[2]
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {arguments}"], cwd=tmp_path, capture_output=True, check=False)
    not_executed(tmp_path / "canary")
    same(done.stdout.decode().split("\n")[0].endswith("r'; touch canary; '\x1b[2J"), True)


# --- D5: out of the folder --------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious.json").write_text('{"precious": true}')
    return folder


@pytest.mark.parametrize("use", [write_report, lambda folder: _held(folder).__enter__()], ids=["report", "resume"])
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, id=f"D5-{part}")
        for part in ("notebooks", "figures", "logs", "html", "loaded", "work", "manifest.json", "results.json",
                     "status.json", ".lock", "figures/00_a_sizes.png", "logs/00_a.log", "html/00_a.html",
                     "notebooks/00_a.ipynb")
    ],
)  # fmt: skip
def test_a_link_in_a_run_folder_reaches_nothing(run, outside, part, use):  # noqa: F811
    path = run / part
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "precious.json" if "." in part else outside)
    refused(lambda: use(run), "outside of the run folder")
    kept(outside / "precious.json", b'{"precious": true}')
    same(os.listdir(outside), ["precious.json"])


@pytest.mark.parametrize("command", ["report", "check", "expect"])
@pytest.mark.parametrize("profile", ["../../../outside", "/tmp/outside", "..", "a/b", "a\\b", ""])
def test_d5_a_profile_that_is_a_path_writes_nothing(run, profile, command):  # noqa: F811
    from typer.testing import CliRunner

    from helpers.base.files import ROOT
    from helpers.cli import app

    content = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(content | {"profile": profile}))
    before = sorted(ROOT.parent.glob("*.json"))
    result = CliRunner().invoke(app, [command, str(run)])
    same(result.exit_code, 2)
    same(sorted(ROOT.parent.glob("*.json")), before)


# --- D6: pages --------------------------------------------------------------------------------------------------------

HOSTILE = {
    "refresh": '<meta http-equiv="refresh" content="0;url=http://evil/">',
    "script": "<script>fetch('http://evil/')</script>",
    "image": '<img src="http://evil/x.png" srcset="http://evil/y.png 2x">',
    "event": '<img src="data:image/png;base64,AA==" onerror="fetch(\'http://evil/\')">',
    "style": "<style>@import url(http://evil/x.css); body { background: url(http://evil/x.png) }</style>",
    "attribute": '<div style="background:url(http://evil/x.png)">x</div>',
    "frame": '<iframe src="http://evil/"></iframe><object data="http://evil/"></object><embed src="http://evil/">',
    "base": '<base href="http://evil/">',
    "link": '<link rel="stylesheet" href="http://evil/x.css"><link rel="dns-prefetch" href="//evil/">',
    "form": '<form action="http://evil/"><input autofocus onfocus="fetch(1)"></form>',
    "address": '<a href="javascript:fetch(1)" ping="http://evil/">x</a>',
    "svg": '<svg><script>fetch(1)</script><image href="http://evil/x.png"/><use href="http://evil/x.svg#a"/></svg>',
    "media": '<video src="http://evil/x.mp4" poster="http://evil/x.png"></video><audio src="//evil/x.mp3"></audio>',
    "close": "</main></body></html><script>fetch(1)</script>",
    "comment": "<!--[if IE]><script>fetch(1)</script><![endif]--><!--><script>fetch(1)</script>-->",
}
ACTIVE = {"script", "iframe", "frame", "object", "embed", "base", "link", "form", "applet"}
LOADED = {"src", "srcset", "poster", "background", "data", "action", "ping", "formaction", "manifest", "xlink:href"}


class Active(HTMLParser):
    """What a page would do by itself."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ACTIVE or (tag == "meta" and dict(attributes).get("http-equiv", "").lower() == "refresh"):
            self.found.append(tag)
        for name, value in attributes:
            address = (value or "").strip().lower()
            loads = name in LOADED or (name == "href" and tag != "a")
            if name.startswith("on") or address.startswith("javascript:"):
                self.found.append(f"{tag} {name}")
            if loads and not address.startswith(("data:", "#")):
                self.found.append(f"{tag} {name}={value}")
            if name == "style" and "url(" in address:
                self.found.append(f"{tag} style={value}")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """One page with all hostile contents, each after its own mark; the parts of its text by mark."""
    folder = tmp_path_factory.mktemp("pages") / "20260131T120000Z-laptop"
    make_run(folder)
    cells = []
    for name, hostile in HOSTILE.items():
        kinds = ("text/html", "text/markdown", "image/svg+xml", "text/plain", "application/javascript", "text/latex")
        outputs = [v4.new_output("display_data", data={kind: hostile, "text/plain": hostile}) for kind in kinds]
        outputs.append(v4.new_output("stream", text=hostile))
        outputs.append(v4.new_output("error", ename=hostile, evalue=hostile, traceback=[hostile]))
        cells += [v4.new_markdown_cell(f"mark-of-{name}"), v4.new_markdown_cell(hostile)]
        cells.append(v4.new_code_cell(hostile, outputs=outputs))
    (folder / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / "00_a.ipynb")
    write_report(folder)
    parts = re.split(r"mark-of-(\w+)", (folder / "html" / "00_a.html").read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", HOSTILE, ids=[f"D6-{name}" for name in HOSTILE])
def test_an_output_does_nothing_on_a_page(hostile_page, name):
    text = hostile_page[name]
    if found := Active(text).found:
        raise Fault("execution", f"{found}")
    if re.search(r"<style[^>]*>[^<]*(@import|url\()", text):
        raise Fault("execution", "a style sheet asks the network")


@pytest.mark.parametrize("name", HOSTILE, ids=[f"D6-report-{name}" for name in HOSTILE])
def test_a_recorded_text_does_nothing_in_the_report(run, name):  # noqa: F811
    from helpers.runs.pages import _render_page
    from helpers.runs.report import _content

    results = json.loads((run / "results.json").read_text())
    results["values"]["00_a"][HOSTILE[name]] = results["values"]["00_a"]["compute"] | {"unit": HOSTILE[name]}
    (run / "results.json").write_text(json.dumps(results))
    if found := Active(_render_page("report.html.j2", _content(run))).found:
        raise Fault("execution", f"{found}")


# --- E6, F10: long outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(lambda size: [("stdout", "A" * size)], id="E6-one-line"),
        pytest.param(lambda size: [("stdout", "a\n" * (size // 2))], id="E6-lines"),
        pytest.param(lambda size: [("stdout", "\r" + "=" * 50) for _ in range(size // 51)], id="E6-progress"),
        pytest.param(lambda size: [("stdout", "x" * 99 + "\n") for _ in range(size // 100)], id="E6-prints"),
        pytest.param(
            lambda size: [(name, "y\n") for _ in range(size // 200) for name in ("stdout", "stderr")], id="E6-two"
        ),
        pytest.param(lambda size: [("stdout", "\x1b[1m" * (size // 4))], id="E6-colours"),
    ],
)
def test_a_long_output_is_saved_in_linear_time(outputs):
    def seconds(size):
        notebook = v4.new_notebook(cells=[v4.new_code_cell("x")])
        notebook.cells[0].outputs = [
            nbformat.NotebookNode(output_type="stream", name=name, text=text) for name, text in outputs(size)
        ]
        begun = time.process_time()
        _Document(("Zx81kQ0pLmN3vB7t",)).text(notebook)
        return time.process_time() - begun

    # The best of three: beside other processes, one measurement may take several times as long.
    small, large = (min(seconds(size) for _ in range(3)) for size in (300_000, 1_200_000))
    small = max(small, 0.02)
    if large > 10 * small:
        raise Fault("wrong", f"four times the output took {large / small:.0f} times the time")


LONG = {
    "line": "print('A' * 5_000_000)",
    "lines": "for number in range(200_000): print(number)",
    "progress": "import sys\nfor step in range(20_000): print(f'\\r{step} of 20000', end='')\nprint()",
    "order": "from IPython.display import display\nprint('one')\ndisplay('two')\nprint('three')",
    "widget": "import ipywidgets as w\nout = w.Output()\nwith out: print('captured')\nout",
    "interact": "w.interact(lambda x: x * 111, x=3);",
    "nowhere": "with w.Output(): print('kept all the same')",
    "error": "try:\n    raise ValueError('E' * 300_000)\nexcept ValueError as error: print(len(str(error)))",
}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    notebook = own_notebook(folder / "own", *LONG.values())
    begun = time.monotonic()
    outcome = workbook("run", "--notebook", notebook, "--folder", folder / "run")
    return folder / "run", outcome, time.monotonic() - begun


@pytest.mark.whole
def test_e6_a_notebook_of_long_outputs_passes_in_time(long_run):
    """A 5 MB line ran into the budget; the limit is generous, for machines that do other things too."""
    _, outcome, seconds = long_run
    outcome.ends(0, "passed")
    if seconds > 100:
        raise Fault("wrong", f"{seconds:.0f} s")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("cell", "right"),
    [
        pytest.param("line", ["A" * 5_000_000 + "\n"], id="E6-line"),
        pytest.param("lines", ["".join(f"{number}\n" for number in range(200_000))], id="E6-short-lines"),
        pytest.param("progress", ["19999 of 20000\n"], id="E6-progress-bar"),
        pytest.param("order", ["one\n", "'two'", "three\n"], id="F10-order"),
        pytest.param("widget", ["captured\n"], id="F4-output"),
        pytest.param("interact", ["333"], id="F4-interact"),
        pytest.param("nowhere", ["kept all the same\n"], id="F4-not-shown"),
        pytest.param("error", ["300000\n"], id="E6-error"),
    ],
)
def test_what_a_cell_put_out_is_in_the_notebook(long_run, cell, right):
    run_folder, _, _ = long_run
    notebook = json.loads((run_folder / "notebooks" / "mine.ipynb").read_text())
    (found,) = [entry for entry in notebook["cells"] if "".join(entry["source"]) == LONG[cell]]
    texts = ["".join(output.get("text") or output["data"]["text/plain"]) for output in found["outputs"]]
    if texts != right:
        raise Fault("lost", f"{str(texts)[:300]} in place of {str(right)[:300]}")


@pytest.mark.whole
@pytest.mark.parametrize(
    "words", ["captured", "333", "kept all the same", "three"], ids=lambda words: f"F4-page-{words}"
)
def test_what_a_widget_captured_is_on_the_page(long_run, words):
    run_folder, _, _ = long_run
    if words not in (run_folder / "html" / "mine.html").read_text():
        raise Fault("lost", f"{words} is not on the page")
