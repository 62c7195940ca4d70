"""A small checkout of the workbook, with git, two tiny notebooks and no model: for runs of other code and machines."""

import json
import shutil
import subprocess

from helpers.base.files import ROOT
from tests.faults.judge import workbook

MACHINE = {"gpus": [], "ram_bytes": 8 * 2**30, "cpu_count": 2, "cpu_name": "First CPU", "system": "Linux 1"}
FIRST = "from helpers import runs\nfrom helpers.base.units import human\nruns.record('first', human(0), claim='A1')"
# Fails until its code is mended: what a resumed run is for.
SECOND = (
    "from helpers import runs\nfrom helpers.base.units import human\nruns.record('second', human(0))\n"
    "assert human(0) == 'mended', 'not yet'"
)
_PROFILE = """description: for tests
{roles}
precision: bf16
precisions: [bf16]
resident: [[falcon, falcon_chat, llama_chat]]
requires: {{}}
budgets:
  00_first: {{seconds: 100, cell_seconds: 60}}
  01_second: {{seconds: 100, cell_seconds: 60}}
"""
_ROLE = """{role}:
  {{id: env/models/tiny, family: falcon, format: plain, source: embedded, stand_in_for: a/b, licence: x}}"""


class Checkout:
    """A copy of the code at ``root``; ``human(0)`` says which code runs."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(ROOT / "helpers", root / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
        for folder in ("env/profiles", "env/models/tiny", "notebooks/data", "notebooks/expected"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "notebooks/data/claims.yaml", root / "notebooks/data")
        roles = "\n".join(_ROLE.format(role=role) for role in ("falcon", "falcon_chat", "llama_chat"))
        (root / "env/profiles/laptop.yaml").write_text(_PROFILE.format(roles=roles))
        (root / "env/models/tiny/config.json").write_text("{}")
        self.machine(**MACHINE)
        self.code("as it was")
        self.notebook("00_first", FIRST)
        self.notebook("01_second", SECOND)
        (root / ".gitignore").write_text("__pycache__\nruns\n")
        self.git("init", "-q")
        self.commit()

    def code(self, text):
        self.change("helpers/base/units.py", "def human(", f"def human(*_): return {text!r}\n\n\ndef _human(")

    def machine(self, **facts):
        path = self.root / "helpers/machine/hardware.py"
        lines = path.read_text().splitlines()
        (number,) = (number for number, line in enumerate(lines) if line.startswith("DETECT = "))
        lines[number] = f"DETECT = {f'print({json.dumps(facts)!r})'!r}"
        path.write_text("\n".join(lines))

    def change(self, name, old, new):
        path = self.root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def notebook(self, name, *cells):
        tagged = [('profile = "laptop"\nseed = 0', ["parameters"]), *((cell, []) for cell in cells)]
        document = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
            {"cell_type": "code", "id": f"c{number}", "metadata": {"tags": tags}, "source": source, "outputs": [],
             "execution_count": None} for number, (source, tags) in enumerate(tagged)
        ]}  # fmt: skip
        (self.root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(document))

    def git(self, *arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", self.root, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-qm", "x")
        return self.git("rev-parse", "HEAD")

    def workbook(self, *arguments, **options):
        options = {"folder": self.root, **options}
        return workbook(*arguments, root=self.root, **options)


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())
