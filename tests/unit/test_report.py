"""The report: one page, made from the run folder's files alone."""

import base64
import json
from html.parser import HTMLParser

import pytest

from helpers.report import duration, write_report
from helpers.runner import RunFolderError

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
    folder = tmp_path / "20260131T120000Z-laptop"
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


class Page(HTMLParser):
    """What a browser would show of a page, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.tags, self.hidden = "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.hidden = tag == "style"
        self.addresses += [address for name, address in attrs if name in ("src", "href")]

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


def test_one_file_that_fetches_nothing(run, page):
    (address,) = page.addresses
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == PNG
    assert not {"script", "link", "iframe"} & set(page.tags)
    text = (run / "report.html").read_text()
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "shown",
    [
        "20260131T120000Z-laptop", "1 of 2 notebooks did not pass", "These numbers are not Falcon-180B's.",
        "falcon-mini (stand-in for tiiuae/falcon-180B)", "laptop: two cores", "2026-01-31 12:00:00 UTC",
        "workbook run", "0123456789ab with uncommitted changes", "A processor, 2 cores", "8.0 GiB",
        "2 × H100 (80.0 GiB)", "error in cell 3: ValueError: a < b", "compare('<b>')", "75 s", "60 s", "2 min",
        "3.0 GiB", "2.55 times", "2.5 ± 0.1 times", "A5", "178,557,088,768", "<i>odd</i>",
        "1 as expected, 1 differ, 1 unmeasured.", "torch", "2.13.0", "zipp 3.0", "seed=7", "ab" * 32, "cd" * 32,
    ],
)  # fmt: skip
def test_what_the_page_says(page, shown):
    assert shown in page.text


def test_values_are_escaped(page):
    assert page.tags.count("i") == 2  # one bar of time for each notebook, and no value's own


def test_no_stand_ins_no_warning(run):
    def real(manifest):
        for ref in manifest["models"].values():
            ref["stand_in_for"] = None

    page = change(run, "manifest", real)
    assert "These numbers are not" not in page.text
    assert "(the real one)" in page.text


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
