"""What the environment tells a process, read when it is asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import base
from helpers.base import settings
from helpers.base.files import ROOT

SOURCES = [path for path in (ROOT / "helpers").rglob("*.py") if path.name != "settings.py"]


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WORKBOOK_") or name == "JPY_SESSION_NAME"]:
        monkeypatch.delenv(name)


def test_outside_of_a_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not base.unattended()
    assert base.run_folder() is None
    assert base.rehearsal_folder() is None
    assert base.work_folder("a") == ROOT / "runs" / "work" / "a"
    assert (base.notebook_name(), settings._profile_name()) == ("notebook", "laptop")
    assert base.expected_file() == ROOT / "notebooks" / "expected" / "laptop.json"
    assert base.kept_commits() == {}
    assert base.cache_folder() == ROOT / ".cache"


def test_in_a_run(monkeypatch):
    values = {
        "RUN_DIR": "/runs/a", "NOTEBOOK": "02_x", "PROFILE": "8x80gb", "EXPECTED": "/e.json", "UNATTENDED": "1",
        "REHEARSAL": "/r", "REVISIONS": '{"org/tiny": "5f"}', "CACHE": "/c",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"WORKBOOK_{name}", value)
    assert base.unattended()
    assert base.run_folder() == Path("/runs/a")
    assert base.work_folder("a") == Path("/runs/a/work/a")
    assert (base.notebook_name(), settings._profile_name()) == ("02_x", "8x80gb")
    assert base.expected_file() == Path("/e.json")
    assert base.rehearsal_folder() == Path("/r")
    assert base.kept_commits() == {"org/tiny": "5f"}
    assert base.cache_folder() == Path("/c")


@pytest.mark.parametrize(
    ("chosen", "name"), [("1x24gb", "1x24gb"), (SimpleNamespace(name="2x80gb"), "2x80gb"), (3, "laptop")]
)
def test_an_open_notebook_names_its_profile(monkeypatch, chosen, name):
    shell = SimpleNamespace(user_ns={"profile": chosen})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/somebody/notebooks/77_mine.ipynb")
    assert settings._profile_name() == name
    assert base.expected_file().name == f"{name}.json"
    assert base.notebook_name() == "77_mine"


def test_no_other_module_reads_these_variables():
    reading = re.compile(r"""(environ\.get\(|environ\[|getenv\()["']WORKBOOK_""")
    assert [path for path in SOURCES if reading.search(path.read_text(encoding="utf-8"))] == []


def test_nothing_is_read_when_it_is_imported():
    code = "import os; os.environ = None; import helpers.base.settings"
    subprocess.run([sys.executable, "-c", code], check=True)
