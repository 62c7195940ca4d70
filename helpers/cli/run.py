"""Commands around a run of the notebooks: fetch its models, run it, read, judge and compare it, open the lab."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.terminal import Terminal
from helpers.cli.workbook import _command, _echo, _print_result, _ProfileOption, _RunFolder, _say


@_command("fetch")
def _fetch(profile: _ProfileOption = "laptop") -> None:
    """Download and check the models of a profile.

    Exit code 0: all are here, 1: a model could not be downloaded, 2: usage.
    """
    from helpers.models import profiles
    from helpers.runs import fetching
    from helpers.runs.interrupts import interruptible

    with interruptible():
        fetching.fetch(profiles.load_profile(profile))


@_command("run")
def _run(
    profile: Annotated[str | None, typer.Option(help="A name in env/profiles, or auto. Default: laptop.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run only notebooks whose name starts with this, e.g. 02 (repeatable, or comma-separated)."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Resume the run in this folder: only notebooks that have not passed or have changed."),
    ] = None,
    *,
    redo: Annotated[
        bool,
        typer.Option("--redo", help="With --resume: also run again what passed with other code or on another machine."),
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the new run. Default: runs/<UTC time>-<profile>.")
    ] = None,
    notebook: Annotated[
        list[Path] | None,
        typer.Option(help="Run this notebook of your own, anywhere on disk, in place of the workbook's (repeatable)."),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Set a parameter of the notebooks (repeatable)."),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option(help="Rehearse without the hardware: plan at full size, run the code on tiny random models."),
    ] = False,
) -> None:
    """Run the notebooks and write a report. Exit code 0: all passed, 1: some failed, 2: usage."""
    from helpers.runs.interrupts import interruptible

    # Loading the modules below takes a moment, in which a signal has its answer, too.
    with interruptible():
        from helpers.runs import execution
        from helpers.runs.request import Request

        request = Request(
            profile,
            only=_prefixes(only),
            parameters=parameter or (),
            resume=resume,
            folder=folder,
            own=notebook or (),
            rehearse=rehearse,
            redo=redo,
        )
        result = execution.run(request, command=["workbook", *sys.argv[1:]])
        _print_result(result)
    raise typer.Exit(0 if result.ok else 1)


def _prefixes(texts: list[str] | None) -> list[str]:
    """The texts of --only, which may be repeated or hold commas. A blank one stays: left out, it would mean all."""
    return [part.strip() for text in texts or () for part in text.split(",")]


@_command("report")
def _report(run: _RunFolder) -> None:
    """Write the report of a run again."""
    from helpers.runs.report import write_report

    _say(write_report(run))


@_command("check")
def _check(run: _RunFolder) -> None:
    """Judge a run by its profile's expected values. Exit code 0: none differs or is missing, 1: some do, 2: usage."""
    from helpers.runs import execution, expected, request, store

    profile = store.read_manifest(run).profile
    path = execution.NOTEBOOKS / "expected" / f"{profile}.json"
    usual = request.usual_parameters(profile, execution.NOTEBOOKS)
    judged = expected.judge(run, store.read_expected(path, required=True), usual)
    for line in (*judged.notes, *judged.differing, *judged.missing):
        _echo(line)
    _echo(f"{path.name}: {judged}")
    raise typer.Exit(0 if judged.passed else 1)


@_command("diff")
def _diff(
    run_a: Annotated[Path, typer.Argument(help="The folder of the run to compare with.")],
    run_b: _RunFolder,
    html: Annotated[Path | None, typer.Option(help="The page to write. Default: RUN_B/diff-<RUN_A>.html.")] = None,
    strict_times: Annotated[
        bool,
        typer.Option("--strict-times", help="Also count times and speeds that differ by more than a factor of two."),
    ] = False,
) -> None:
    """Compare two runs, as text and as a page. Exit code 0: no difference beyond tolerance, 1: some, 2: usage."""
    from helpers.runs import difference, difference_views

    compared = difference.compare_runs(run_a, run_b, strict_times=strict_times)
    problem: WorkbookError | None = None
    try:
        # Before the tables, of which somebody may read the first lines alone.
        page = difference_views.write_page(compared, html)
    except WorkbookError as error:
        problem = error
    console = Terminal()
    for part in difference_views.tables(compared):
        console.print(part)
    if problem is not None:
        raise problem
    _say(f"Page: {page}")
    raise typer.Exit(1 if compared.differing else 0)


@_command("lab")
def _lab() -> None:
    """Open JupyterLab in notebooks/, with this environment's kernel."""
    options = [f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"]
    # The process becomes JupyterLab, so Ctrl-C and signals reach it without a parent in between.
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options])
