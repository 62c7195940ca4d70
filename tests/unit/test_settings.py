"""What the environment tells a process, read when it is asked for."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import settings
from helpers.types import ROOT

SOURCES = [path for path in (ROOT / "helpers").rglob("*.py") if path.name != "settings.py"]


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WORKBOOK_") or name == "JPY_SESSION_NAME"]:
        monkeypatch.delenv(name)


def test_outside_of_a_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not settings.unattended()
    assert settings.run_folder() is None
    assert settings.rehearsal_folder() is None
    assert settings.work_folder("a") == ROOT / "runs" / "work" / "a"
    assert (settings.notebook_name(), settings.profile_name()) == ("notebook", "laptop")
    assert settings.expected_file() == ROOT / "notebooks" / "expected" / "laptop.json"
    assert settings.kept_commits() == {}
    assert settings.cache_folder() == ROOT / ".cache"


def test_in_a_run(monkeypatch):
    values = {
        "RUN_DIR": "/runs/a", "NOTEBOOK": "02_x", "PROFILE": "8x80gb", "EXPECTED": "/e.json", "UNATTENDED": "1",
        "REHEARSAL": "/r", "REVISIONS": '{"org/tiny": "5f"}', "CACHE": "/c",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"WORKBOOK_{name}", value)
    assert settings.unattended()
    assert settings.run_folder() == Path("/runs/a")
    assert settings.work_folder("a") == Path("/runs/a/work/a")
    assert (settings.notebook_name(), settings.profile_name()) == ("02_x", "8x80gb")
    assert settings.expected_file() == Path("/e.json")
    assert settings.rehearsal_folder() == Path("/r")
    assert settings.kept_commits() == {"org/tiny": "5f"}
    assert settings.cache_folder() == Path("/c")


@pytest.mark.parametrize(
    ("chosen", "name"), [("1x24gb", "1x24gb"), (SimpleNamespace(name="2x80gb"), "2x80gb"), (3, "laptop")]
)
def test_an_open_notebook_names_its_profile(monkeypatch, chosen, name):
    shell = SimpleNamespace(user_ns={"profile": chosen})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/somebody/notebooks/77_mine.ipynb")
    assert settings.profile_name() == name
    assert settings.expected_file().name == f"{name}.json"
    assert settings.notebook_name() == "77_mine"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_other_module_reads_these_variables(path):
    text = path.read_text(encoding="utf-8")
    for reading in ('environ.get("WORKBOOK_', 'environ["WORKBOOK_', 'getenv("WORKBOOK_'):
        assert reading not in text


def test_nothing_is_read_when_it_is_imported():
    code = "import os; os.environ = None; import helpers.settings"
    subprocess.run([sys.executable, "-c", code], check=True)
