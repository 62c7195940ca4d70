"""The environment that a child starts with, and what of the caller's it leaves out.

A start-up file, a module path or a Git variable of whoever starts a run would change what the run measures, and no
record would say so. ``isolated`` leaves such variables out; ``conditions`` says in a few phrases what was left out and
what stays though it may matter, for the manifest of a run.
"""

from __future__ import annotations

import os
import site
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# What changes how Python finds modules, what it runs at its start, and what code does. Those that only concern files
# of byte code, buffers or the order of sets stay: PYTHONDONTWRITEBYTECODE, PYTHONUNBUFFERED, PYTHONHASHSEED and so on.
_PYTHON = """
PYTHONASYNCIODEBUG PYTHONBREAKPOINT PYTHONCASEOK PYTHONCOERCECLOCALE PYTHONDEBUG PYTHONDEVMODE PYTHONDUMPREFS
PYTHONEXECUTABLE PYTHONHOME PYTHONINSPECT PYTHONINTMAXSTRDIGITS PYTHONIOENCODING PYTHONMALLOC PYTHONMALLOCSTATS
PYTHONNODEBUGRANGES PYTHONOPTIMIZE PYTHONPATH PYTHONPERFSUPPORT PYTHONPLATLIBDIR PYTHONPROFILEIMPORTTIME
PYTHONSTARTUP PYTHONTRACEMALLOC PYTHONUSERBASE PYTHONUTF8 PYTHONVERBOSE PYTHONWARNDEFAULTENCODING PYTHONWARNINGS
PYTHON_CONTEXT_AWARE_WARNINGS PYTHON_FROZEN_MODULES PYTHON_GIL PYTHON_JIT PYTHON_PERF_JIT_SUPPORT PYTHON_PRESITE
PYTHON_THREAD_INHERIT_CONTEXT
"""
# `git rev-parse --local-env-vars`, and those that change where a repository is looked for.
_GIT = """
GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_CEILING_DIRECTORIES GIT_COMMON_DIR GIT_CONFIG GIT_CONFIG_COUNT
GIT_CONFIG_PARAMETERS GIT_DIR GIT_DISCOVERY_ACROSS_FILESYSTEM GIT_GRAFT_FILE GIT_IMPLICIT_WORK_TREE GIT_INDEX_FILE
GIT_NAMESPACE GIT_NO_REPLACE_OBJECTS GIT_OBJECT_DIRECTORY GIT_PREFIX GIT_REPLACE_REF_BASE GIT_SHALLOW_FILE
GIT_WORK_TREE
"""
_JUPYTER = """
IPYTHONDIR IPYTHON_SUPPRESS_CONFIG_ERRORS JPY_PARENT_PID JPY_SESSION_NAME JUPYTER_CONFIG_DIR JUPYTER_CONFIG_PATH
JUPYTER_DATA_DIR JUPYTER_PATH JUPYTER_PREFER_ENV_PATH JUPYTER_RUNTIME_DIR LOGLEVEL MATPLOTLIBRC MPLBACKEND
"""
# What torchrun, mpirun and accelerate tell each of several processes that they start. Left over in the shell of one, it
# makes that one wait for others that nobody starts.
_LAUNCHED = """
FORK_LAUNCHED GROUP_RANK GROUP_WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT MPI_LOCALNRANKS
MPI_LOCALRANKID NODE_RANK RANK ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE WORLD_SIZE
"""
_LAUNCHERS = (
    *("ACCELERATE_", "FSDP_", "MV2_COMM_WORLD_", "OMPI_COMM_WORLD_", "PARALLELISM_CONFIG_", "PMI_", "PMIX_"),
    "TORCHELASTIC_",
)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_CLEAN = {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
_LEFT_OUT = frozenset((_PYTHON + _GIT + _JUPYTER).split())
# What stays, because a machine may need it, and is told: libraries put in front of others, a shell's start-up file, and
# how many threads and which kernels compute.
_TOLD = (
    *("BASH_ENV", "DYLD_", "LD_AUDIT", "LD_LIBRARY_PATH", "LD_PRELOAD", "ATEN_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_"),
    *("KMP_", "MKL_", "NVIDIA_TF32_OVERRIDE", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTORCH_", "TORCH_", "TRITON_"),
)
_CHARACTERS = 200


def isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that runs this checkout's code: the caller's, without what would change the child.

    Modules come from the checkout, the standard library and the installed packages: neither from the current folder
    nor from the user's own folder of packages. Texts are UTF-8.
    """
    kept = {name: value for name, value in environment.items() if name not in _LEFT_OUT and not _of_launcher(name)}
    return kept | _CLEAN


def without_git(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a Git that looks at the repository of its folder, whatever the caller's variables name."""
    return {name: value for name, value in environment.items() if name not in _GIT.split()}


@contextmanager
def started_alone() -> Iterator[None]:
    """Within the block this process takes itself for one of several only if torchrun started it as one.

    Raises WorkbookError if another program did, or only its variables say so: the process would wait for the others.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        yield
        return
    for name in _SIZES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise WorkbookError(
                f"{name} is {value}, but torchrun has not started this process: it would wait for the others for ever. "
                f"Start several processes with torchrun --nproc-per-node {value}, or unset {name}."
            )
    left = {name: os.environ.pop(name) for name in list(os.environ) if _of_launcher(name)}
    try:
        yield
    finally:
        os.environ.update(left)


def _of_launcher(name: str) -> bool:
    return name in _LAUNCHED.split() or name.startswith(_LAUNCHERS)


def conditions(environment: Mapping[str, str]) -> list[str]:
    """What of an environment, and of this Python, may change what children compute, a phrase each; often nothing."""
    phrases = []
    for name in sorted(environment):
        left_out = name in _LEFT_OUT or _of_launcher(name)
        if left_out and environment[name] and environment[name] != _CLEAN.get(name):
            phrases.append(f"{name} is set, and was left out")
    for name in sorted(environment):
        if name.startswith(_TOLD) and environment[name]:
            phrases.append(f"{name}={environment[name][:_CHARACTERS]}")
    return [*phrases, *_start_up_files()]


def _start_up_files() -> Iterator[str]:
    """Files that run code in each Python of this environment and that belong to none of its packages."""
    packages = [Path(folder) for folder in site.getsitepackages()]
    for folder in dict.fromkeys([Path(sysconfig.get_path("stdlib")), *packages]):
        for name in ("sitecustomize.py", "usercustomize.py"):
            if (folder / name).exists():
                yield f"{folder / name} runs at the start of Python"
    for folder in packages:
        for path in sorted(folder.glob("*.pth")):
            if _runs_code(path) and not _packaged(path):
                yield f"{path} runs code at the start of Python"


def _runs_code(path: Path) -> bool:
    # site runs the lines that begin so, and takes all others for folders.
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith(("import ", "import\t")) for line in lines)


def _packaged(path: Path) -> bool:
    """True if an installed package lists the file among its own."""
    entry = f"{path.name},".encode()
    for record in path.parent.glob("*.dist-info/RECORD"):
        try:
            content = record.read_bytes()
        except OSError:
            continue
        if content.startswith(entry) or b"\n" + entry in content:
            return True
    return False
