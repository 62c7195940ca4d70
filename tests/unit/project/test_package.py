"""The package as a whole: quick to import, in layers, with faces that hold what they promise, and no old names left."""

import ast
import importlib
import pkgutil
import re
import statistics
import subprocess
import sys
import time

import pytest
import yaml

import helpers
from helpers.base.files import ROOT

HEAVY = {"torch", "transformers", "pandas", "nbformat", "papermill", "matplotlib", "scipy", "bitsandbytes", "IPython"}
# It subclasses transformers' Falcon, and is imported by the functions that need it.
IMPORTS_TORCH = {"helpers.models.workarounds.grouped_cache"}
FILES = sorted((ROOT / "helpers").rglob("*.py"))
GROUPS = sorted(found.name for found in pkgutil.iter_modules(helpers.__path__))
# The modules of the flat package that came before the groups.
REMOVED = [
    "bench", "chat", "comparison", "decoding", "difference", "doctor", "finetuning", "grouped_cache", "hardware",
    "loading", "memory", "miniature", "miniature.card", "miniature.quality", "miniature.talk", "miniature.texts",
    "miniature.training", "pages", "plots", "profiles", "progress", "prompts", "quantization", "rehearsal",
    "report", "results", "runner", "runner.child", "runner.display", "runner.execution", "runner.fetching",
    "runner.folder", "runner.manifest", "runner.parameters", "runner.portable", "runner.processes",
    "runner.redaction", "runner.rendering", "runner.supervision", "shards", "stats", "types", "widgets",
    "engines.cases", "engines.library", "engines.measure", "engines.output", "engines.session", "engines.translate",
    "engines.virtual", "evaluation.choices",
]  # fmt: skip
# Where these names may stand: the list above, and the history.
ALLOWED = {"CHANGELOG.md", "tests/unit/project/test_package.py"}


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def faces() -> list[str]:
    """The packages whose ``__init__`` makes a public face."""
    inits = [path for path in FILES if path.name == "__init__.py"]
    return [module_name(path) for path in inits if "= face(" in path.read_text(encoding="utf-8")]


def seconds(code: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


def test_import_takes_under_a_tenth_of_a_second_over_bare_python():
    assert seconds("import helpers") - seconds("pass") < 0.1


def test_no_module_imports_a_heavy_library_when_it_is_imported():
    names = sorted({module_name(path) for path in FILES} - IMPORTS_TORCH)
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert HEAVY.isdisjoint(loaded)


def test_a_group_imports_only_groups_below_it():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_group_but_the_commands_has_a_face():
    assert {f"helpers.{group}" for group in GROUPS} - set(faces()) <= {"helpers.cli"}


@pytest.mark.parametrize("package", faces())
def test_every_name_of_a_face_is_the_object_of_its_module(package):
    face = importlib.import_module(package)
    homes = homes_of(package)
    submodules = {found.name for found in pkgutil.iter_modules(face.__path__)}
    assert face.__all__ == dir(face) == sorted(homes)
    assert submodules.isdisjoint(homes), "a face name that is a module's name, too: one of them is out of reach"
    for name, module in homes.items():
        assert not name.startswith("_")
        home = importlib.import_module(f"{package}.{module}")
        assert getattr(face, name) is getattr(home, name)


def homes_of(package: str) -> dict[str, str]:
    """The modules by the names that a face's source gives to ``face``."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    (table,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    homes = {}
    for module, names in ast.literal_eval(table).items():
        for name in names:
            assert name not in homes, f"{package} names {name} twice"
            homes[name] = module
    return homes


def test_a_name_that_a_face_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'helpers.models' has no attribute 'no_such_name'"):
        helpers.models.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", REMOVED)
def test_the_flat_modules_are_gone(name):
    try:
        module = importlib.import_module(f"helpers.{name}")
    except ModuleNotFoundError:
        return
    # A folder that git left behind because of its caches is an empty namespace.
    assert module.__file__ is None, f"{module.__file__} is here again"


def test_nothing_speaks_of_the_flat_modules():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    names = "|".join(name.replace(".", "[./]") for name in REMOVED)
    old = re.compile(rf"\bhelpers[./]({names})\b|\bfrom helpers import [\w, ]*\b({names})\b")
    found = []
    for name in set(listed) - ALLOWED:
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # not a text, or deleted and not yet committed
        found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if old.search(line)]
    assert not found, "\n".join(sorted(found))


def test_the_files_that_newcomers_are_sent_to_exist():
    changes = yaml.safe_load((ROOT / "tests/unit/project/where_it_goes.yaml").read_text(encoding="utf-8"))
    for change in changes:
        assert any((ROOT / file).exists() for file in change["files"]), change["change"]


def test_public_functions_are_documented():
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
