"""The command ``workbook`` itself: its version, its help panels, and how a command reports an error.

Exit codes: 0: done (of a run: every notebook passed), 1: some notebook failed or the run stopped, 2: invalid usage.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from helpers import __version__
from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT

if TYPE_CHECKING:
    from helpers.runs.execution import RunResult

P = ParamSpec("P")
R = TypeVar("R")
USERS = "Commands"
MAINTAINERS = "For maintainers of the workbook"
ProfileOption = Annotated[str, typer.Option("--profile", help="A name in env/profiles, or auto.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/20260131T120000Z-laptop.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"workbook {__version__}")
        raise typer.Exit


@app.callback()
def _workbook(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Falcon-180B by doing: run the notebooks, plan a machine, open the lab."""


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print a WorkbookError as one line and exit: with its own code (RunError: 1), or 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_checkout()
            return command(*args, **kwargs)
        except WorkbookError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 2)) from error

    return wrapped


def _check_checkout() -> None:
    """Raises WorkbookError outside a checkout: a wheel holds the module alone, without profiles and notebooks."""
    # Asked here and not in the callback, which runs before ``workbook run --help``, too: help needs no checkout.
    if not (ROOT / "env" / "profiles").is_dir():
        raise WorkbookError(
            f"This command needs the workbook's checkout, but there is no env/profiles in {ROOT}: clone the "
            "repository, run make setup in it, and use its .venv/bin/workbook."
        )


def split(texts: Iterable[str] | None) -> list[str]:
    """The values of an option that may be repeated, or given once with commas."""
    parts = []
    for text in texts or ():
        parts += [part.strip() for part in text.split(",") if part.strip()]
    return parts


def shortened(path: Path) -> str:
    """The path as a person in this folder would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def print_result(result: RunResult, report_path: Path) -> None:
    """Print what became of each notebook, how to resume those that did not pass, and where the report is."""
    for name in result.passed:
        typer.echo(f"passed  {name}")
    for name, reason in result.failed.items():
        typer.echo(f"FAILED  {name}: {reason}")
    if not result.ok:
        # Only an activated environment has the command on its path.
        command = "workbook" if shutil.which("workbook") else ".venv/bin/workbook"
        typer.echo(f"Resume the notebooks that did not pass: {command} run --resume {shortened(result.folder)}")
    typer.echo(f"Report: {report_path}")
