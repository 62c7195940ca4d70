"""The report and the notebooks' pages, made from the run folder's files alone."""

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat import v4

from helpers.base.files import ROOT
from helpers.base.units import duration
from helpers.runs import RunFolderError, write_report
from helpers.runs.claims import _claim_verdict, _ledger, _read_claims
from helpers.runs.pages import _link_to_pages
from helpers.runs.schema import _RecordedValue

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def model(name, stand_in_for):
    return {
        "id": f"env/models/{name}", "label": f"{name} (stand-in for {stand_in_for})" if stand_in_for else name,
        "source": "embedded", "file": None, "revision": None, "licence": "Apache-2.0", "stand_in_for": stand_in_for,
        "sha256": {"model.safetensors": "ab" * 32},
    }  # fmt: skip


def entry(status, **changes):
    return {
        "status": status, "reason": None, "cell": 5, "cells": 5, "line": "x", "seconds": 75.2, "budget_seconds": 120,
        "expected_seconds": 60, "started": "2026-01-31T12:00:00Z", "peak_bytes": 3 * 2**30, "inputs": "",
    } | changes  # fmt: skip


def value(number, unit="", **changes):
    plain = {"claim": None, "expected": None, "tolerance": None, "source": None, "verdict": "unmeasured"}
    return {"value": number, "unit": unit} | plain | changes


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "20260131T120000Z-laptop")


def make_run(folder):
    """A small run folder: two notebooks, three values, a figure."""
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "00_a_sizes.png").write_bytes(PNG)
    manifest = {
        "profile": "laptop", "description": "two cores", "command": ["workbook", "run"], "parameters": {},
        "started": "2026-01-31T12:00:00Z", "finished": "2026-01-31T12:03:00Z", "seeds": {"00_a": 0},
        "notebooks": {"00_a": {"sha256": "cd" * 32, "parameters": {"seed": 7}}},
        "models": {"falcon": model("falcon-mini", "tiiuae/falcon-180B"), "llama_chat": model("real", None)},
        "git": {"commit": "0123456789abcdef", "dirty": True}, "python": "3.11.7",
        "packages": {"torch": "2.13.0", "zipp": "3.0"},
        "hardware": {
            "gpus": [{"name": "H100", "total_bytes": 80 * 2**30}] * 2, "ram_bytes": 8 * 2**30, "cpu_count": 2,
            "cpu_name": "A processor", "system": "Linux",
        },
    }  # fmt: skip
    status = {"state": "finished", "notebooks": {
        "00_a": entry("passed"),
        "01_b": entry("failed", reason="error in cell 3: ValueError: a < b", cell=3, line="compare('<b>')"),
    }}  # fmt: skip
    expected = {"expected": 2.5, "tolerance": 0.1, "source": "citation x", "claim": "A5"}
    results = {
        "values": {"00_a": {
            "size": value(2.55, "times", verdict="as expected", **expected),
            "compute": value(4.5, "times", verdict="differs", **expected),
            "<i>odd</i>": value(178_557_088_768),
        }},
        "figures": {"00_a": {"sizes": "figures/00_a_sizes.png"}},
    }  # fmt: skip
    for name, content in {"manifest": manifest, "status": status, "results": results}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


WIDGET, WIDGET_STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"


def output(data):
    return v4.new_output("display_data", data={"text/plain": "plain", **data})


def executed(run, name, *cells):
    """Write an executed notebook of a run, and return its path."""
    path = run / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(("recorded", "shown"), [({"peak_bytes": 5 * 2**30}, "5.0 GiB"), ({}, "3.0 GiB")])
def test_the_peak_memory_is_the_run_s_where_it_was_recorded(run, recorded, shown):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | recorded))
    assert f"<b>{shown}</b><span>peak memory</span>" in write_report(run).read_text()


@pytest.fixture
def notebook(run):
    """An executed notebook with every kind of output, and one that would load much if it could."""
    outputs = [
        output({"image/png": base64.b64encode(PNG).decode()}),
        output({"text/html": "<b>a table</b>"}),
        output({WIDGET: {"model_id": "1", "version_major": 2, "version_minor": 0}}),
        output({"application/javascript": "fetch('https://example.org')"}),
        v4.new_output("stream", text="printed \x1b[31mred\x1b[0m"),
    ]
    path = executed(
        run,
        "00_a",
        v4.new_markdown_cell(
            "# A title\n\nNext: [b](01_b.ipynb#part), [c](02_c.ipynb), [web](https://example.org) $x^2$"
        ),
        v4.new_code_cell("answer = 42", outputs=outputs, execution_count=1),
    )
    document = nbformat.read(path, as_version=4)
    document.metadata["widgets"] = {WIDGET_STATE: {"state": {}, "version_major": 2, "version_minor": 0}}
    nbformat.write(document, path)
    return path


class Page(HTMLParser):
    """What a browser would show of a page, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.loaded, self.tags, self.ids, self.hidden = "", [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.hidden = tag == "style"
        self.addresses += [address for name, address in attrs if name == "href"]
        self.loaded += [address for name, address in attrs if name == "src" or (name == "href" and tag == "link")]
        self.ids += [identifier for name, identifier in attrs if name == "id"]

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += "" if self.hidden else f" {' '.join(data.split())} "


@pytest.fixture
def page(run):
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def change(run, name, update):
    path = run / f"{name}.json"
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_no_page_of_a_run_loads_anything(run, notebook):
    write_report(run)
    pages = [run / "report.html", run / "html" / "00_a.html"]
    assert sorted(run.rglob("*.html")) == sorted(pages)
    for path in pages:
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        (address,) = page.loaded
        assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == PNG
        assert not {"script", "link", "iframe"} & set(page.tags)
        assert not re.findall(r"url\(|@import", text)
        assert "default-src 'none'" in text
        assert "prefers-color-scheme: dark" in text
    assert "://" not in pages[0].read_text(encoding="utf-8")


def test_the_page_of_an_executed_notebook(run, notebook):
    assert "html/00_a.html" in Page(write_report(run).read_text(encoding="utf-8")).addresses
    page = Page((run / "html" / "00_a.html").read_text(encoding="utf-8"))
    for shown in ("A title", "answer", "42", "a table", "red", "plain", "20260131T120000Z-laptop: 00_a, as executed"):
        assert shown in page.text
    assert "../report.html#notebooks" in page.addresses


def test_a_notebook_that_failed_half_way_has_a_page(run):
    error = v4.new_output("error", ename="ValueError", evalue="a < b", traceback=["\x1b[31mValueError\x1b[39m: a < b"])
    executed(run, "01_b", v4.new_code_cell("compare()", outputs=[error]), v4.new_code_cell("never_run()"))
    write_report(run)
    page = Page((run / "html" / "01_b.html").read_text(encoding="utf-8"))
    assert "ValueError" in page.text
    assert ": a < b" in page.text
    assert "never_run" in page.text


def test_only_a_newer_notebook_is_converted_again(run, notebook):
    write_report(run)
    page = run / "html" / "00_a.html"
    page.write_text("kept")
    write_report(run)
    assert page.read_text() == "kept"
    later = page.stat().st_mtime + 1
    os.utime(notebook, (later, later))
    write_report(run)
    assert "A title" in page.read_text(encoding="utf-8")


def test_a_new_page_mends_the_links_to_it(run, notebook):
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_markdown_cell("[next](01_b.ipynb)"))
    nbformat.write(content, notebook)
    write_report(run)
    first = run / "html" / "00_a.html"
    assert 'href="../report.html#notebooks">next' in first.read_text(encoding="utf-8")
    shutil.copy(notebook, run / "notebooks" / "01_b.ipynb")
    write_report(run)
    assert 'href="01_b.html">next' in first.read_text(encoding="utf-8")


def test_links_between_notebooks_lead_to_pages():
    text = "[b](01_b.ipynb#part) [c](02_c.ipynb) [web](https://example.org/x.ipynb)"
    linked = "[b](01_b.html#part) [c](../report.html#notebooks) [web](https://example.org/x.ipynb)"
    assert _link_to_pages(text, ["00_a", "01_b"]) == linked


def test_every_link_within_the_report_has_its_target(page):
    targets = {address.removeprefix("#") for address in page.addresses if address.startswith("#")}
    assert {"run", "models", "notebooks", "claims", "values", "figures", "versions", "claim-A5"} <= targets
    assert targets <= set(page.ids)


@pytest.mark.parametrize(
    "shown",
    [
        "20260131T120000Z-laptop", "1 of 2 notebooks did not pass", "These numbers are not Falcon-180B's.",
        "falcon-mini (stand-in for tiiuae/falcon-180B)", "laptop: two cores", "2026-01-31 12:00:00 UTC",
        "workbook run", "0123456789ab with uncommitted changes", "A processor, 2 cores", "8.0 GiB",
        "2 × H100 (80.0 GiB)", "error in cell 3: ValueError: a < b", "compare('<b>')", "75 s", "60 s", "2 min",
        "3.0 GiB", "2.55 times", "2.5 ± 0.1 times", "A5", "178,557,088,768", "<i>odd</i>",
        "1 as expected, 1 differ, 1 unmeasured.", "2 × H100 (80.0 GiB); how it ended: 1 of 2 notebooks did not pass.",
        "sizes, from", "0 of 29", "It is two and a half times the size of Llama-2-70B.", "shown, not judged",
        "torch", "2.13.0", "zipp 3.0", "seed=7", "ab" * 32, "cd" * 32,
    ],
)  # fmt: skip
def test_what_the_page_says(page, shown):
    assert shown in page.text


def test_values_are_escaped(page):
    assert page.tags.count("i") == 2  # one bar of time for each notebook, and no value's own


def test_the_claims_section(run):
    stand_in = "falcon-mini (stand-in for tiiuae/falcon-180B)"

    def judged(results):
        results["values"]["01_b"] = {
            "cache_bytes": value(8192, claim="A12", agrees=False, model="real"),
            "kv_bytes_8_heads": value(163840, "bytes/token", claim="A8", agrees=True, model=stand_in),
        }

    page = change(run, "results", judged)
    claims = [identifier for identifier in page.ids if identifier.startswith("claim-")]
    assert claims == [f"claim-A{number}" for number in range(1, 30)]
    for shown in ("not confirmed", "on the stand-in falcon-mini: agrees", "kv bytes 8 heads", "163,840 bytes/token"):
        assert shown in page.text
    assert (
        "All 29: 0 confirmed, 1 not confirmed, 1 judged on stand-ins, 1 shown and not judged, 26 without a" in page.text
    )
    assert "2 of 29" in page.text


def verdicts(run):
    return {claim.number: (claim.text, claim.verdict.basis) for claim in _ledger(run)}


def test_the_ledger_says_why_a_claim_has_no_verdict(run):
    found = verdicts(run)
    assert list(found) == [f"A{number}" for number in range(1, 30)]
    assert found["A1"] == ("not measured in this run", "00_a recorded no value for it")
    assert found["A8"] == ("not measured in this run", "00_a recorded no value for it; 01_b did not pass")
    assert found["A18"] == ("not measured in this run", "notebook 02 was not part of it")
    assert found["A9"][0] == "not testable on the profile laptop"
    assert "Falcon-180B and Llama-2-70B themselves" in found["A9"][1]
    assert found["A12"][0] == "not testable: cited"
    assert all(basis for verdict, basis in found.values() if verdict.startswith("not "))


def test_the_real_model_makes_a_claim_testable(run):
    change(run, "manifest", lambda manifest: manifest["models"]["falcon"].update(stand_in_for=None))
    assert verdicts(run)["A9"] == ("not measured in this run", "no notebook records it")
    change(run, "manifest", lambda manifest: manifest["models"]["falcon"].update(rehearsed=True))
    assert verdicts(run)["A9"][0] == "not testable in a rehearsal"


@pytest.mark.parametrize(
    ("label", "verdict"),
    [
        ("real", ("confirmed", "measured on real")),
        ("falcon-mini (stand-in for tiiuae/falcon-180B)", ("on the stand-in falcon-mini: agrees", "")),
        ("other-mini (stand-in for x)", ("on the stand-in other-mini: agrees", "")),  # of another profile
        ("falcon-mini", ("on the stand-in falcon-mini: agrees", "")),
        (None, ("confirmed", "computed")),
    ],
)
def test_only_a_real_model_of_the_profile_confirms(run, label, verdict):
    def judged(results):
        results["values"]["00_a"] = {"speed": value(2.0, claim="A19", agrees=True, model=label)}

    change(run, "results", judged)
    assert verdicts(run)["A19"] == verdict


def test_what_a_verdict_reaches(run):
    def judged(results):
        results["values"]["00_a"] = {"utilisation": value(0.48, claim="A4", agrees=True)}

    page = change(run, "results", judged)
    assert verdicts(run)["A4"] == ("confirmed in part", "computed")
    assert "1 confirmed, 1 of them in part, 0 not confirmed" in page.text
    assert "tested: that GPU hours, tokens and parameters are consistent" in page.text
    assert "tested: the web part of the data" not in page.text  # A2, which has no verdict


def test_an_unknown_claim_is_shown_as_one(run):
    page = change(run, "results", lambda results: results["values"]["00_a"]["size"].update(claim="A99"))
    assert "not in the workbook's list of claims" in page.text


STAND_INS = {"mini (stand-in for big)": "mini", "chat (stand-in for big-chat)": "chat"}
MINI, CHAT = STAND_INS


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([(None, None)], "shown, not judged"),
        ([(True, None), (None, "real")], "confirmed"),
        ([(True, None), (False, "real")], "not confirmed"),
        ([(True, MINI), (None, None)], "on the stand-in mini: agrees"),
        ([(True, None), (None, MINI)], "confirmed"),
        ([(False, None), (True, MINI)], "not confirmed"),
        ([(None, None), (None, MINI)], "shown, not judged"),
        ([(True, MINI), (None, CHAT)], "on the stand-in mini: agrees"),
        ([(True, MINI), (False, CHAT)], "on the stand-ins mini and chat: does not agree"),
        ([(True, MINI), (True, CHAT), (True, MINI)], "on the stand-ins mini and chat: agrees"),
        ([(None, MINI)], "shown on the stand-in mini"),
    ],
)
def test_what_values_say_of_a_claim(values, verdict):
    entries = [_RecordedValue(value=1, unit="", agrees=agrees, model=model) for agrees, model in values]
    assert _claim_verdict(entries, STAND_INS).text == verdict


@pytest.mark.parametrize(
    ("values", "basis"),
    [
        ([(True, None), (True, "real"), (True, MINI)], "computed and measured on real"),
        ([(True, None), (False, "real")], "measured on real"),
        ([(None, "real"), (False, None)], "computed"),
        ([(True, MINI)], ""),
    ],
)
def test_what_a_verdict_rests_on(values, basis):
    entries = [_RecordedValue(value=1, unit="", agrees=agrees, model=model) for agrees, model in values]
    assert _claim_verdict(entries, STAND_INS).basis == basis


def test_the_list_of_claims_is_whole():
    claims = _read_claims()
    assert list(claims) == [f"A{number}" for number in range(1, 30)]
    for claim in claims.values():
        assert claim.statement
        assert claim.source
        assert claim.how
        assert claim.test in {"arithmetic", "model", "real model", "citation"}
        assert bool(claim.why) == (claim.test in {"real model", "citation"})
        assert bool(claim.notebooks) == (claim.test in {"arithmetic", "model"})


def test_the_list_of_claims_names_the_notebooks_that_record_them():
    claims = _read_claims()
    recorded = {
        (number, path.name[:2])
        for path in (ROOT / "notebooks" / "source").glob("*.py")
        for number in re.findall(r'"(A\d+)"', path.read_text(encoding="utf-8"))
    }
    assert len(recorded) > 10
    for number, notebook in recorded:
        assert notebook in claims[number].notebooks


def test_values_that_differ_come_first(page):
    recorded = page.text[page.text.index("Values that differ come first.") :]
    assert recorded.index("compute") < recorded.index("size")


def test_figures_stand_in_the_order_of_the_notebooks(run):
    (run / "figures" / "01_b_loss.png").write_bytes(PNG)

    def second_first(results):
        results["figures"] = {"01_b": {"loss": "figures/01_b_loss.png"}} | results["figures"]

    page = change(run, "results", second_first)
    assert page.text.index("sizes, from") < page.text.index("loss, from")


def test_no_stand_ins_no_warning(run):
    def real(manifest):
        for ref in manifest["models"].values():
            ref["stand_in_for"] = None

    page = change(run, "manifest", real)
    assert "These numbers are not" not in page.text
    assert "(the real one)" in page.text


def test_the_models_that_the_notebooks_loaded_stand_beside_those_of_the_profile(run):
    assert "Loaded by the notebooks" not in Page(write_report(run).read_text(encoding="utf-8")).text  # an earlier run
    load = {"notebook": "00_a", "role": "falcon", "model": "tiiuae/falcon-180B", "label": "falcon-180B"}
    loads = [
        {**load, "precision": "nf4", "commit": "5f" * 20},
        {**load, "precision": "nf4", "commit": "5f" * 20, "notebook": "01_b"},
        {**load, "precision": "bf16", "commit": None},
    ]
    page = change(run, "manifest", lambda manifest: manifest.update(loaded=loads))
    text = " ".join(page.text[page.text.index("Loaded by the notebooks") :].split())
    assert f"falcon-180B nf4 {'5f' * 6} 00_a, 01_b falcon-180B bf16 – 00_a Notebooks" in text


def test_outcomes(run):
    def passed(status):
        status["notebooks"]["01_b"]["status"] = "passed"

    def cut_short(status):
        status["state"] = "interrupted"

    assert "all 2 notebooks passed" in change(run, "status", passed).text
    assert "interrupted: 2 of 2 notebooks passed" in change(run, "status", cut_short).text


def test_a_run_without_results_finish_or_known_hardware(run):
    (run / "results.json").unlink()

    def bare(manifest):
        manifest |= {"finished": None, "hardware": {"error": "no torch"}, "git": {"commit": None, "dirty": None}}

    page = change(run, "manifest", bare)
    for shown in ("No notebook recorded a value.", "unknown (no torch)", "not a git checkout"):
        assert shown in page.text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (119.6, "2 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (14400, "4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
