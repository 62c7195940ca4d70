"""Run transformers' own tests of Falcon twice, with its own attention and with our grouped cache, and compare.

    .venv/bin/python tests/upstream/falcon_with_grouped_cache.py FOLDER [--repository URL] [--commit SHA]

FOLDER is made; it needs the network and about 1 GB. The shared test files come from the source package of the installed
version of transformers, those of Falcon, of generation and of the pipelines from its repository at ``--commit``,
because source packages do not hold them. Two modules that are younger than that commit are replaced by a skip: tests
of several processes and of exported programs do not run here. Nothing of it belongs into this repository.

Exit code 0: every test ended the same way both times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/huggingface/transformers"
COMMIT = "2da00a3cec88fac160d481406e7961cf59472894"  # 30 March 2026: the newest whose Falcon tests were at hand

# Loaded by pytest before the tests. The block is never left: every Falcon of the process is built with it.
PLUGIN = """\
import os

if os.environ.get("GROUPED_CACHE"):
    from helpers.models.workarounds.grouped_cache import _GroupedFalconModel, grouped_cache

    # The tests find the configuration's class by the model's name.
    _GroupedFalconModel.__name__ = _GroupedFalconModel.__qualname__ = "FalconModel"
    block = grouped_cache()
    block.__enter__()
"""
YOUNGER = {
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "distributed_testing_utils.py": (
        "import unittest\n\n\ndef run_distributed(*_, **__):\n    raise unittest.SkipTest('several processes')\n"
    ),
}


def main() -> int:
    """Fetch, run twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", default=REPOSITORY)
    parser.add_argument("--commit", default=COMMIT)
    given = parser.parse_args()
    tree = _tests(given.folder.absolute(), given.repository, given.commit)
    print("transformers", version("transformers"), "tests of", given.commit)
    plain, grouped = _outcomes(tree, grouped=False), _outcomes(tree, grouped=True)
    for title, outcomes in (("transformers' attention", plain), ("grouped cache", grouped)):
        counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{title}: {counts}")
    differing = [test for test in sorted(plain | grouped) if plain.get(test) != grouped.get(test)]
    for test in differing:
        print(f"{test}: {plain.get(test)} with transformers' attention, {grouped.get(test)} with the grouped cache")
    return 1 if differing else 0


def _tests(folder: Path, repository: str, commit: str) -> Path:
    """The source package with the tests that it lacks; made once."""
    tree = folder / f"transformers-{version('transformers')}"
    if (tree / "complete").exists():
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-q"]
    package = f"transformers=={version('transformers')}"
    subprocess.run(
        [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", folder, package],
        check=True,
    )
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    # transformers' test files need it; the workbook does not.
    subprocess.run([*pip, "install", "--no-deps", "--target", tree / "extra", "parameterized==0.9.0"], check=True)
    with tempfile.TemporaryDirectory() as clone:
        git = ["git", "-C", clone]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "fetch", "-q", "--depth", "1", repository, commit], check=True)
        files = subprocess.Popen([*git, "archive", commit, "tests", "utils", "conftest.py"], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "--skip-old-files", "-C", tree], stdin=files.stdout, check=True)
        if files.wait():
            raise SystemExit(f"git archive of {commit} failed")
    for name, text in YOUNGER.items():
        (tree / "tests" / name).parent.mkdir(exist_ok=True)
        (tree / "tests" / name).write_text(text)
    (tree / "grouped_cache_plugin.py").write_text(PLUGIN)
    (tree / "complete").touch()
    return tree


def _outcomes(tree: Path, grouped: bool) -> dict[str, str]:
    """Run the Falcon tests of the tree; how each ended, by its name."""
    report = tree / ("grouped.xml" if grouped else "plain.xml")
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tree, tree / "extra"))),
        "GROUPED_CACHE": "1" if grouped else "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "grouped_cache_plugin"]
    subprocess.run(
        [*command, "-W", "ignore", f"--junitxml={report}", "tests/models/falcon"],
        cwd=tree,
        env=environment,
        check=False,
    )
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
