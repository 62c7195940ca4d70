"""The exercise and solution cells of the notebooks' sources, by the name of the exercise."""

import re
import tempfile
from pathlib import Path

import jupytext
import torch

from helpers import evaluation, exercises, generation, machine, models, training
from helpers.base.files import ROOT

DATA = ROOT / "notebooks" / "data"
SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))
MODULES = {"torch": torch, "exercises": exercises, "machine": machine, "models": models, "evaluation": evaluation}
MODULES |= {"generation": generation, "training": training, "Path": Path, "tempfile": tempfile}


def _cells(path, tag):
    return [c["source"] for c in jupytext.read(path)["cells"] if tag in c["metadata"].get("tags", [])]


def _solution(markdown):
    return re.search(r"```python\n(.*?)```", markdown, re.DOTALL).group(1)


def _name(code):
    return re.search(r'check\("([^"]+)"', code)[1]


def without_check(code):
    """A cell without its last line, which is the check, and that line."""
    body, last = code.rstrip().rsplit("\n", 1)
    return body, last


STUBS = {_name(code): code for path in SOURCES for code in _cells(path, "exercise")}
SOLUTIONS = {_name(code): _solution(code) for path in SOURCES for code in _cells(path, "solution")}
