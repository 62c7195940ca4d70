"""The command ``workbook`` itself: how a command is registered, how it reports an error, and what commands share.

A module of this group registers its commands with ``_command``; the functions have no other callers.

Exit codes: 0: done (of a run: every notebook passed), 1: some notebook failed or the run stopped, 2: invalid usage.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TextIO, TypeVar

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from helpers import __version__
from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.hub_variables import check_hub_variables
from helpers.base.installed import damage
from helpers.base.text import one_line, printable, shell_word

if TYPE_CHECKING:
    from helpers.runs.execution import RunResult

_P = ParamSpec("_P")
_R = TypeVar("_R")
USERS = "Commands"
MAINTAINERS = "For maintainers of the workbook"
_ProfileOption = Annotated[str, typer.Option("--profile", help="A name in env/profiles, or auto.")]
_RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/20260131T120000Z-laptop.")]


class _Commands(TyperGroup):
    """The commands. What typer itself says of a wrong call goes through the same rules as all that is printed."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the options of the command itself."""
        with _usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, *args: Any, **options: Any) -> Any:
        """Read a command's arguments and run it."""
        with _usage_errors():
            return super().invoke(*args, **options)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except TyperException as error:
        if message := vars(error).get("message"):
            vars(error)["message"] = one_line(_hidden(message))
        raise


class _App(typer.Typer):
    """All commands. Help and version, which no command prints, may meet a full disk, too."""

    def __call__(self, *args: object, **options: object) -> object:
        """Run the command that the arguments name."""
        try:
            return super().__call__(*args, **options)
        except OSError as error:
            _complain(f"Error: Cannot read or write ({error.strerror or error}).")
            _give_up(sys.stdout)
            raise SystemExit(1) from error


app = _App(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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
            _complain(f"Error: {error}")
            raise typer.Exit(getattr(error, "exit_code", 2)) from error
        except KeyboardInterrupt as error:
            _complain("Interrupted.")
            raise typer.Exit(130) from error
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # BrokenPipeError: who read the output is gone, and typer ends without a word
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            _complain(f"Error: Cannot read or write{where} ({error.strerror or error}).")
            raise typer.Exit(1) from error
        except Exception as error:
            # What nobody expected may come from a package that somebody has removed by halves.
            why = damage()
            if not why:
                raise
            _complain(f"Error: {type(error).__name__}: {error}. {why}")
            raise typer.Exit(1) from error

    return wrapped


def _check_checkout() -> None:
    """Raise WorkbookError outside a checkout: a wheel holds the package alone, without profiles and notebooks."""
    # Asked here and not in the callback, which runs before ``workbook run --help``, too: help needs no checkout.
    if not (ROOT / "env" / "profiles").is_dir():
        raise WorkbookError(
            f"This command needs the workbook's checkout, but there is no env/profiles in {ROOT}. Clone the "
            "repository, run make setup in it, and use its .venv/bin/workbook."
        )


def _say(text: object, *, error: bool = False) -> None:
    """Print a text. All that commands print goes through here, or through ``base.terminal``: it may hold anything."""
    typer.echo(printable(_hidden(text)), err=error)


def _hidden(text: object) -> str:
    """The text without secrets: an error's message may hold an address with a password."""
    from helpers.runs.redaction import for_screen

    return for_screen(str(text))


def _split(texts: Iterable[str] | None) -> list[str]:
    """The values of an option that may be repeated, or given once with commas."""
    parts = []
    for text in texts or ():
        parts += [part.strip() for part in text.split(",") if part.strip()]
    return parts


def _shortened(path: Path) -> str:
    """The path as a person in this folder would type it."""
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except FileNotFoundError:  # somebody deleted the folder that the shell is in
        return str(path)


def _echo(text: str) -> None:
    """Print a line. Nobody may read it any more, or the disk of a log may be full: then the work goes on unseen."""
    try:
        _say(text)
    except OSError as error:
        _give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _complain(f"The standard output cannot be written ({error.strerror}).")


def _complain(text: str) -> None:
    """Print a line on the standard error, if it can be written: the exit code says what happened all the same."""
    try:
        _say(text, error=True)
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    # What waits to be written would make Python's own exit code an error.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_result(result: RunResult) -> None:
    """Print what became of each notebook and how to go on, then write the report and print where it is."""
    from helpers.runs.interrupts import interruptible

    for name in result.passed:
        _echo(f"passed  {one_line(name)}{' (kept from an earlier start)' if name in result.kept else ''}")
    for name, reason in result.failed.items():
        _echo(f"FAILED  {one_line(name)}: {one_line(reason)}")
    # Only an activated environment has the command on its path.
    command = "workbook" if shutil.which("workbook") else ".venv/bin/workbook"
    resume = f"{command} run --resume {shell_word(_shortened(result.folder))}"
    if result.interrupted:
        _echo("The run was interrupted.")
    if not result.ok:
        _echo(f"Resume the notebooks that did not pass: {resume}")
    if result.kept:
        _echo(
            f"Kept from other code, packages or models, or from another machine: {', '.join(result.kept)}. The report "
            f"names what their values are of. To run them again: {resume} --redo"
        )
    try:
        with interruptible():
            _echo(f"Report: {_reported(result.folder, command)}")
    except KeyboardInterrupt:
        _echo(f"Report: interrupted. To write it: {command} report {shell_word(_shortened(result.folder))}")


def _reported(folder: Path, command: str) -> str:
    """Write the report of a run; where it is, or why there is none, which is no reason to hide how the run ended."""
    from helpers.runs.report import write_report

    try:
        return str(write_report(folder))
    except Exception as error:
        told = str(error) if isinstance(error, WorkbookError) else f"{type(error).__name__}: {error}."
        return f"not written. {told} To try again: {command} report {shell_word(_shortened(folder))}"
