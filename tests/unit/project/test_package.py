"""The package as a whole: quick to import, layered, and typed as promised."""

import ast
import statistics
import subprocess
import sys
import time

from helpers.base.files import ROOT

HEAVY = ("torch", "transformers", "pandas", "nbformat", "papermill", "matplotlib", "scipy", "bitsandbytes", "IPython")
ROOMS = sorted(path for path in (ROOT / "helpers").rglob("*.py"))


def seconds(code: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


def test_import_takes_under_three_tenths_of_a_second_over_bare_python():
    assert seconds("import helpers") - seconds("pass") < 0.3


def test_no_room_imports_a_heavy_library_when_it_is_imported():
    names = ["helpers." + ".".join(p.relative_to(ROOT / "helpers").with_suffix("").parts) for p in ROOMS]
    names = [name.removesuffix(".__init__") for name in names if "__main__" not in name]
    names.remove(
        "helpers.models.workarounds.grouped_cache"
    )  # subclasses transformers' Falcon: imported where it is used
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not set(HEAVY) & set(loaded)


def test_a_room_imports_only_rooms_above_it():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_public_functions_are_documented_and_short():
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{path.name}: {node.name} is long"
                if not node.name.startswith("_") and path.parent.name == "helpers" and node.col_offset == 0:
                    assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
