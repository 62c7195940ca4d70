"""What the environment tells a process: the only module that reads the WORKBOOK_* variables.

=======================  ===========================================================================================
``WORKBOOK_RUN_DIR``     the folder of the run that this process belongs to
``WORKBOOK_NOTEBOOK``    the name of the notebook
``WORKBOOK_PROFILE``     the name of the run's profile
``WORKBOOK_EXPECTED``    the file with the values that this profile should give
``WORKBOOK_UNATTENDED``  1 in a run: nobody is there to click on a widget
``WORKBOOK_REHEARSAL``   the folder of a rehearsal, see ``helpers.planning.rehearsal``
``WORKBOOK_REVISIONS``   the commits that a run keeps to: a JSON object from a repository's id to its commit
``WORKBOOK_CACHE``       the folder for unpacked models; ``.cache`` of the project by default
=======================  ===========================================================================================

The runner sets all of them but the last. ``WORKBOOK_VLLM_PYTHON`` is an option of ``workbook bench``. Every function
reads the environment when it is called, so a test or a notebook can change it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from helpers.base.files import ROOT

DEFAULT_PROFILE = "laptop"


def unattended() -> bool:
    """True in a run by ``workbook run``: nobody is there to click on a widget."""
    return os.environ.get("WORKBOOK_UNATTENDED") == "1"


def run_folder() -> Path | None:
    """The folder of the run that this process belongs to; None outside of a run."""
    return _folder("WORKBOOK_RUN_DIR")


def work_folder(name: str) -> Path:
    """The folder for work that an interrupt must not lose: in the run's folder, or in ``runs/work``."""
    return (run_folder() or ROOT / "runs") / "work" / name


def notebook_name() -> str:
    """The name of this process's notebook, without a suffix; "notebook" if nothing tells it.

    The runner tells it. Elsewhere (in Jupyter, VS Code, papermill or nbconvert) the notebook itself does, in a variable
    ``notebook_name``, so that a copy under another name finds its expected values too.
    """
    if name := os.environ.get("WORKBOOK_NOTEBOOK"):
        return name
    names = _open_names()
    told = names.get("notebook_name")
    if isinstance(told, str) and told:
        return told
    # Jupyter's own servers tell the kernel its path in an environment variable, VS Code in a Python one.
    path = os.environ.get("JPY_SESSION_NAME") or names.get("__vsc_ipynb_file__")
    return Path(path if isinstance(path, str) else "notebook").stem


def expected_file() -> Path:
    """The file with the values that this process's profile should give; it need not exist."""
    default = ROOT / "notebooks" / "expected" / f"{_profile_name()}.json"
    return Path(os.environ.get("WORKBOOK_EXPECTED", default))


def rehearsal_folder() -> Path | None:
    """The folder of the rehearsal that this process belongs to; None outside of a rehearsal."""
    return _folder("WORKBOOK_REHEARSAL")


def kept_commits() -> dict[str, str]:
    """The commit that the run keeps to, by a hub repository's id; empty outside of a run."""
    return dict(json.loads(os.environ.get("WORKBOOK_REVISIONS") or "{}"))


def cache_folder() -> Path:
    """The folder for unpacked models: ``$WORKBOOK_CACHE``, or ``.cache`` of the project."""
    return Path(os.environ.get("WORKBOOK_CACHE") or ROOT / ".cache")


def _folder(variable: str) -> Path | None:
    name = os.environ.get(variable)
    if not name:
        return None
    return Path(name)


def _open_names() -> dict[str, object]:
    """The variables of the open notebook; none outside of one."""
    # A process that has not imported IPython is not a notebook.
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return {}
    return dict(shell.user_ns)


def _profile_name() -> str:
    """The name of the profile: the run's, or what the open notebook calls ``profile``, or laptop."""
    if name := os.environ.get("WORKBOOK_PROFILE"):
        return name
    chosen = _open_names().get("profile", DEFAULT_PROFILE)
    if isinstance(chosen, str):
        return chosen
    # A reader may have put the loaded profile in the place of its name.
    return str(getattr(chosen, "name", DEFAULT_PROFILE))
