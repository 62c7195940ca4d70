"""The command ``workbook`` itself: how a command is registered, how it reports an error, and what commands share.

A module of this group registers its commands with ``_command``; the functions have no other callers.

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
from helpers.base.hub_variables import check_hub_variables

if TYPE_CHECKING:
    from helpers.runs.execution import RunResult

_P = ParamSpec("_P")
_R = TypeVar("_R")
USERS = "Commands"
MAINTAINERS = "For maintainers of the workbook"
_ProfileOption = Annotated[str, typer.Option("--profile", help="A name in env/profiles, or auto.")]
_RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/20260131T120000Z-laptop.")]
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


def _command(name: str, panel: str = USERS) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Register a function as the command ``name``; the help lists it in a panel, in the order of registration."""

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        return app.command(name, rich_help_panel=panel)(_reports_errors(function))

    return register


def _reports_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Print a WorkbookError as one line and exit: with its own code (RunError: 1), or 2."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            _check_checkout()
            check_hub_variables()
            return command(*args, **kwargs)
        except WorkbookError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 2)) from error

    return wrapped


def _check_checkout() -> None:
    """Raise WorkbookError outside a checkout: a wheel holds the package alone, without profiles and notebooks."""
    # Asked here and not in the callback, which runs before ``workbook run --help``, too: help needs no checkout.
    if not (ROOT / "env" / "profiles").is_dir():
        raise WorkbookError(
            f"This command needs the workbook's checkout, but there is no env/profiles in {ROOT}. Clone the "
            "repository, run make setup in it, and use its .venv/bin/workbook."
        )


def _split(texts: Iterable[str] | None) -> list[str]:
    """The values of an option that may be repeated, or given once with commas."""
    parts = []
    for text in texts or ():
        parts += [part.strip() for part in text.split(",") if part.strip()]
    return parts


def _shortened(path: Path) -> str:
    """The path as a person in this folder would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _print_result(result: RunResult, report_path: Path) -> None:
    """Print what became of each notebook, how to resume those that did not pass, and where the report is."""
    for name in result.passed:
        typer.echo(f"passed  {name}")
    for name, reason in result.failed.items():
        typer.echo(f"FAILED  {name}: {reason}")
    if not result.ok:
        # Only an activated environment has the command on its path.
        command = "workbook" if shutil.which("workbook") else ".venv/bin/workbook"
        typer.echo(f"Resume the notebooks that did not pass: {command} run --resume {_shortened(result.folder)}")
    typer.echo(f"Report: {report_path}")
