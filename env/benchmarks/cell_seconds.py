"""CPU and wall seconds of each code cell of a notebook's source, run in this process as in a laptop run.

``OMP_NUM_THREADS=1 .venv/bin/python env/benchmarks/cell_seconds.py 04``: with one thread, CPU seconds compare between
busy and quiet machines; with more, OpenMP's threads burn them while they wait for each other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def run(source: Path) -> None:
    """Print a line for each code cell, then the sum. Exits where a cell fails."""
    import jupytext
    from IPython.core.interactiveshell import InteractiveShell

    shell, total = InteractiveShell.instance(), 0.0
    cells = jupytext.read(source, fmt={"extension": ".py", "format_name": "percent"}).cells
    code = [cell.source for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for number, text in enumerate(code, 1):
        cpu, wall = cpu_seconds(), time.monotonic()
        with redirect_stdout(StringIO()):
            shell.run_cell(text).raise_error()
        cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
        total += cpu
        print(f"{number:3} cpu {cpu:6.2f} wall {wall:6.2f}  {text.splitlines()[0][:70]}", flush=True)
    print(f"sum cpu {total:.2f}")


def main() -> None:
    """Find the notebook, and set what the runner sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", help="the start of its name, such as 04")
    (source,) = (ROOT / "notebooks/source").glob(f"{parser.parse_args().notebook}*.py")
    os.chdir(ROOT / "notebooks")
    sys.path.insert(0, str(ROOT))
    with TemporaryDirectory() as folder:
        names = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WORKBOOK_UNATTENDED": "1"}
        names |= {"WORKBOOK_RUN_DIR": folder, "WORKBOOK_NOTEBOOK": source.stem, "WORKBOOK_PROFILE": "laptop"}
        os.environ.update(names, MPLBACKEND="module://matplotlib_inline.backend_inline")
        run(source)


if __name__ == "__main__":
    main()
