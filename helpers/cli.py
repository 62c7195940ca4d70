"""The command ``workbook``; each command is a few lines over the rooms above.

Exit codes: 0 done (of a run: all passed), 1 some notebook failed or the run stopped, 2 a request that makes no sense.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helpers.types import ROOT, WorkbookError, choose

if TYPE_CHECKING:
    from helpers.doctor import Finding
    from helpers.evaluation import Leaderboard
    from helpers.runner import RunResult

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Falcon-180B by doing: run the notebooks, plan a machine, open the lab.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ProfileOption = Annotated[str, typer.Option("--profile", help="A name in env/profiles, or auto.")]
MODELS = ROOT / "env" / "models"
WORK = ROOT / "runs" / "train-mini"
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/20260131T120000Z-laptop.")]


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print a WorkbookError as one line and exit: with its own code (RunError: 1), or 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except WorkbookError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 2)) from error

    return wrapped


@app.command()
@reports_errors
def run(
    profile: Annotated[str | None, typer.Option(help="A name in env/profiles, or auto; laptop when left out.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Notebooks whose names start so, such as 02; repeat, or use commas.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run folder: only what has not passed, or has changed.")
    ] = None,
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Where a new run goes; runs/<UTC time>-<profile> when left out.")
    ] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="Set a parameter.")] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Without its machine: plan at the true size, run the code on tiny random models.")
    ] = False,
) -> None:
    """Run the notebooks and write a report. Exit code 0: all passed, 1: some failed, 2: usage."""
    from helpers import runner
    from helpers.report import write_report

    request = runner.Request(
        profile,
        only=_split(only),
        parameters=parameter or (),
        resume=resume,
        folder=folder,
        rehearse=rehearse,
    )
    result = runner.run(request, command=["workbook", *sys.argv[1:]])
    _print_result(result, write_report(result.folder))
    raise typer.Exit(0 if result.ok else 1)


@app.command()
@reports_errors
def fetch(profile: ProfileOption = "laptop") -> None:
    """Download the models of a profile, and check them. Exit code 0: all are here, 1: one cannot be had, 2: usage."""
    from helpers import profiles, runner

    runner.fetch(profiles.load_profile(profile))


@app.command()
@reports_errors
def doctor(
    profile: ProfileOption = "laptop",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is here, what lacks and what to do. Exit code 0: the profile can run, 1: it cannot, 2: usage."""
    from helpers import doctor, profiles

    chosen = profiles.load_profile(profile)
    findings = doctor.examine(chosen)
    failed = doctor.failures(findings)
    if as_json:
        found = {"profile": chosen.name, "can_run": not failed, "findings": [vars(each) for each in findings]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        verdict = f"cannot run here: see {', '.join(failed)}" if failed else "can run here"
        Console(highlight=False).print(_findings(findings), f"\n[bold]{chosen.name}[/bold] {verdict}")
    raise typer.Exit(1 if failed else 0)


@app.command()
@reports_errors
def check(run: RunFolder) -> None:
    """Judge a run by its profile's expected values. Exit code 0: none differs or is missing, 1: some do, 2: usage."""
    from helpers import expected, runner, store

    path = runner.NOTEBOOKS / "expected" / f"{store.read_manifest(run).profile}.json"
    judged = expected.judge(run, store.read_expected(path, required=True))
    for line in (*judged.differing, *judged.missing):
        typer.echo(line)
    typer.echo(f"{path.name}: {judged}")
    raise typer.Exit(0 if judged.passed else 1)


@app.command()
@reports_errors
def report(run: RunFolder) -> None:
    """Write the report of a run again."""
    from helpers.report import write_report

    typer.echo(write_report(run))


@app.command()
@reports_errors
def diff(
    run_a: Annotated[Path, typer.Argument(help="The folder of the run to compare with.")],
    run_b: RunFolder,
    html: Annotated[Path | None, typer.Option(help="The page to write; RUN_B/diff-<RUN_A>.html when left out.")] = None,
    strict_times: Annotated[
        bool, typer.Option("--strict-times", help="Count a time or speed off by more than a factor of two, too.")
    ] = False,
) -> None:
    """Compare two runs, as text and as a page. Exit code 0: no difference beyond tolerance, 1: some, 2: usage."""
    from helpers import difference, difference_views

    compared = difference.compare_runs(run_a, run_b, strict_times=strict_times)
    console = Console(highlight=False)
    for part in difference_views.tables(compared):
        console.print(part)
    typer.echo(f"Page: {difference_views.write_page(compared, html)}")
    raise typer.Exit(1 if compared.differing else 0)


@app.command()
@reports_errors
def render() -> None:
    """Make notebooks/*.ipynb from notebooks/source, with the outputs of a laptop run."""
    from helpers import runner
    from helpers.report import write_report

    result = runner.render()
    _print_result(result, write_report(result.folder))
    raise typer.Exit(0 if result.ok else 1)


@app.command()
@reports_errors
def expect(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one profile.")]) -> None:
    """Update the expected values from finished runs that agree. Values with a cited source are kept."""
    from helpers import expected, runner, store

    measured = expected.expected_from_runs(runs)
    path = runner.NOTEBOOKS / "expected" / f"{store.read_manifest(runs[0]).profile}.json"
    earlier = store.read_expected(path)
    cited = {key: entry for key, entry in earlier.items() if entry.cited}
    path.parent.mkdir(exist_ok=True)
    store.write_expected(path, measured | cited)
    typer.echo(f"{path}: {len(measured)} values from {len(runs)} runs, {len(cited)} from citations")


@app.command()
def lab() -> None:
    """Open JupyterLab in notebooks/, with this environment's kernel."""
    options = [f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options])


@app.command("train-mini")
@reports_errors
def train_mini(
    data: Annotated[Path, typer.Option(help="The folder with the text files that the recipe names.")],
    stage: Annotated[list[str] | None, typer.Option(help="tokenizer, base or chat; repeat; all when left out.")] = None,
    work: Annotated[Path, typer.Option(help="Where checkpoints go; the same command resumes from there.")] = WORK,
    out: Annotated[Path, typer.Option(help="Where the two models go.")] = MODELS,
    recipe: Annotated[Path | None, typer.Option(help="Another recipe than falcon-mini's.", exists=True)] = None,
) -> None:
    """Make falcon-mini and falcon-mini-chat anew, as env/models/falcon-mini/recipe.yaml says."""
    from helpers.miniature import training

    settings = training.read_recipe(recipe or training.RECIPE)
    training.train(data, work, settings, stage or training.STAGES, out)
    typer.echo(f"Trained: {_short(out)}. What it is worth: workbook evaluate-mini --models {_short(out)}")


@app.command("evaluate-mini")
@reports_errors
def evaluate_mini(
    models: Annotated[Path, typer.Option(help="The folder of falcon-mini and falcon-mini-chat.")] = MODELS,
) -> None:
    """Measure falcon-mini on held-out texts and write its quality.json, its curve and its model card."""
    from helpers.miniature import card
    from helpers.profiles import load_profile

    figures = card.measure(models, load_profile("laptop").llama_chat)
    card.write(models, figures)
    table = Table("measured", "value (95% interval)")
    for name, value in figures.items():
        if "samples" not in name:
            table.add_row(name, _figure(value))
    Console().print(table)


@app.command()
@reports_errors
def leaderboard(
    profile: ProfileOption = "laptop",
    model: Annotated[str, typer.Option(help="Of the profile: falcon, falcon_chat or llama_chat.")] = "falcon",
    *,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, int8 or nf4; the profile's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task, at least 2.")] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="A folder of task files in place of the harness' own.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Measure the average of the Open LLM Leaderboard of 2023 beside the published ones; its data are downloaded.

    Exit code 0: measured, 1: the data cannot be had, 2: usage.
    """
    from helpers import evaluation, loading
    from helpers.profiles import load_profile

    chosen = load_profile(profile)
    choose(model, chosen.models, "model")
    load = functools.partial(loading.load, chosen.models[model], precision or chosen.precision)
    found = evaluation.leaderboard_average(load, limit=limit, folder=tasks or evaluation.TASKS)
    Console(highlight=False).print(_leaderboard(found), "\n".join(found.notes), sep="\n")


@app.command()
@reports_errors
def bench(
    profile: ProfileOption = "laptop",
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few sizes, two runs each, without what starts slowly.")
    ] = False,
    engines: Annotated[
        list[str] | None, typer.Option(help="plain, default, fastest, llama.cpp, ctranslate2, vllm; repeat, or commas.")
    ] = None,
    models: Annotated[list[str] | None, typer.Option(help="falcon, falcon_chat, llama_chat, shape.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Tokens of prompt and reply: 128, 512, 1900.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Sequences at a time: 1, 4, 16.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Of the context, generated.", min=2)] = 32,
    repeats: Annotated[int | None, typer.Option(help="Timed runs of each engine; 5, or 2 with --quick.", min=1)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, int8 or nf4; the profile's.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a run is given up.")] = 300,
    peers: Annotated[Path | None, typer.Option(help="Where the peers are installed; .cache/peers.")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(envvar="WORKBOOK_VLLM_PYTHON", help="The Python with vLLM; .cache/vllm/bin/python.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the results; runs/bench-<UTC time>.")] = None,
) -> None:
    """Time engines on the same weights, in turn: a table, a figure, a JSON file. See env/benchmarks/README.md.

    Exit code 0: done (also where an engine is missing: its rows say so), 1: interrupted, what was measured is kept.
    2: usage.
    """
    from helpers.engines import session
    from helpers.profiles import load_profile

    wish = session.Wish(
        quick, _split(engines), _split(models), _whole(context), _whole(batch), new_tokens, repeats, precision, limit,
        peers or session.PEERS, vllm_python, out,
    )  # fmt: skip
    found = session.run(load_profile(profile), wish)
    typer.echo((found.folder / "bench.md").read_text(encoding="utf-8"))
    typer.echo(f"{'Interrupted; measured so far' if found.interrupted else 'Results'}: {_short(found.folder)}")
    raise typer.Exit(1 if found.interrupted else 0)


@app.command()
@reports_errors
def plan(
    profile: Annotated[str | None, typer.Option(help="A name in env/profiles, or auto; laptop when left out.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Another model, such as meta-llama/Llama-2-13b-chat-hf.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="NxGB", help="Other GPUs: 8x80, or 4x80,2x40; for Falcon-180B or --model.")
    ] = None,
    *,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, int8 or nf4.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of context; 2048 when left out.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4 with its scales quantized too.")] = False,
    library_cache: Annotated[
        bool, typer.Option("--library-cache", help="Falcon's cache as transformers itself keeps it: all query heads.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw each device into this PNG file.")] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="List every precision and set of GPUs that runs Falcon-180B or --model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show memory, placement, speed limit, download and disk of a profile or model, without loading anything.

    Exit code 0: answered, also where the answer is that it does not fit, by how much, and what would. 2: usage.
    """
    from helpers import memory, planning

    work = memory.Workload(batch, context, "library" if library_cache else "kv", double_quant)
    if suggest:
        asked = planning.suggested_for(profile, model, gpus, double_quant=double_quant, figure=figure is not None)
        found = planning.suggest(asked, work, precision)
        text, shown = planning.to_json(found), [planning.suggestion_table(found, work, model)]
    else:
        made = planning.make(profile, model, gpus, precision, work)
        text, shown = planning.to_json(made), planning.tables(made)
        if figure:
            planning.save_figure(made, figure)
    if as_json:
        typer.echo(text)
    else:
        console = Console(highlight=False)
        for part in shown:
            console.print(part)
            console.print()


def _findings(findings: Sequence[Finding]) -> Table:
    """The findings, each with what to do on a line of its own."""
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for each in findings:
        text = Text(each.found)
        if each.advice and each.status != "ok":
            text.append(f"\n-> {each.advice}", style="bold")
        table.add_row(Text(each.status, style=colours[each.status]), each.name, text)
    return table


def _leaderboard(found: Leaderboard) -> Table:
    table = Table("task", "shots", "metric", "score", "standard error", "items", box=None, pad_edge=False)
    table.title, table.title_justify = f"{found.model}, {found.precision}, percent", "left"
    for each in found.scores:
        numbers = (f"{each.score:.2f}", f"{each.standard_error:.2f}", f"{each.count:,}")
        table.add_row(each.task, str(each.shots), each.metric, *numbers)
    table.add_row("average", "", "", f"{found.average:.2f}", f"{found.standard_error:.2f}", style="bold")
    for name, value in found.published.items():
        table.add_row(f"{name}, published", "", "", f"{value:.2f}")
    return table


def _figure(value: float | list[float]) -> str:
    return f"{value[0]} ({value[1]}-{value[2]})" if isinstance(value, list) else str(value)


def _split(texts: Iterable[str] | None) -> list[str]:
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def _whole(texts: Iterable[str] | None) -> list[int]:
    parts = _split(texts)
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise WorkbookError(f"Not a whole number: {', '.join(wrong)}.")
    return [int(part) for part in parts]


def _print_result(result: RunResult, report_path: Path) -> None:
    for name in result.passed:
        typer.echo(f"passed  {name}")
    for name, reason in result.failed.items():
        typer.echo(f"FAILED  {name}: {reason}")
    if not result.ok:
        command = "workbook" if shutil.which("workbook") else ".venv/bin/workbook"
        typer.echo(f"Go on with what did not pass: {command} run --resume {_short(result.folder)}")
    typer.echo(f"Report: {report_path}")


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
