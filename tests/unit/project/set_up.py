"""The modules of env/setup, loaded from a copy of the checkout without staying in this process's modules."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

_FILES = {"place": "place", "pip_runs": "pip_runs", "environment": "environment", "driver": "driver",
          "packages": "packages", "main": "__main__"}  # fmt: skip


def modules(project: Path) -> SimpleNamespace:
    """The modules by name; ``main`` is what make setup runs."""
    loaded = {}
    for name, file in _FILES.items():
        spec = importlib.util.spec_from_file_location(name, project / "env" / "setup" / f"{file}.py")
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    for name in loaded:
        del sys.modules[name]
    return SimpleNamespace(**loaded)
