"""Commands that measure models: the leaderboard's average, and the speed of engines."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from helpers.base.errors import WorkbookError, choose
from helpers.base.terminal import Terminal
from helpers.cli.workbook import _command, _ProfileOption, _say, _shortened, _split

if TYPE_CHECKING:
    from helpers.evaluation.leaderboard import Leaderboard

_EnginesOption = Annotated[
    list[str] | None,
    typer.Option(help="plain, default, fastest, llama.cpp, ctranslate2, vllm (repeatable, or comma-separated)."),
]
_PeersOption = Annotated[
    Path | None, typer.Option(help="Folder with the other programs' packages. Default: .cache/peers.")
]
_VllmOption = Annotated[
    Path | None,
    typer.Option(
        envvar="WORKBOOK_VLLM_PYTHON", help="Python interpreter that has vLLM. Default: .cache/vllm/bin/python."
    ),
]
_PrecisionOption = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp16, int8 or nf4. Default: the profile's precision.")
]


@_command("leaderboard")
def _leaderboard(
    profile: _ProfileOption = "laptop",
    model: Annotated[str, typer.Option(help="A model of the profile: falcon, falcon_chat or llama_chat.")] = "falcon",
    *,
    precision: _PrecisionOption = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many items of each task, at least 2.")] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="Folder of task files that replace the harness' own.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Measure the average of the Open LLM Leaderboard of 2023 and compare it with the published ones.

    Its data are downloaded. Exit code 0: measured, 1: the data could not be downloaded, 2: usage.
    """
    from helpers.evaluation import leaderboard as evaluation_leaderboard
    from helpers.evaluation import tasks as evaluation_tasks
    from helpers.models import loading
    from helpers.models.profiles import load_profile

    chosen = load_profile(profile)
    choose(model, chosen.models, "model")
    load = functools.partial(loading.load, chosen.models[model], precision or chosen.precision)
    measured = evaluation_leaderboard.leaderboard_average(load, limit=limit, folder=tasks or evaluation_tasks.TASKS)
    Terminal().print(_leaderboard_table(measured), "\n".join(measured.notes), sep="\n")


@_command("bench")
def _bench(
    profile: _ProfileOption = "laptop",
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few sizes, two runs each, without the engines that start slowly.")
    ] = False,
    engines: _EnginesOption = None,
    models: Annotated[list[str] | None, typer.Option(help="falcon, falcon_chat, llama_chat, shape.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Tokens of prompt and reply: 128, 512, 1900.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Sequences at a time: 1, 4, 16.")] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Number of tokens to generate, counted within --context.", min=2)
    ] = 32,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs of each engine. Default: 5, or 2 with --quick.", min=1)
    ] = None,
    precision: _PrecisionOption = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a run is given up.")] = 300,
    peers: _PeersOption = None,
    vllm_python: _VllmOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: runs/bench-<UTC time>.")] = None,
) -> None:
    """Time engines on the same weights, in turn: a table, a figure, a JSON file. See env/benchmarks/README.md.

    Exit code 0: done (also if an engine is missing: its rows say so), 1: interrupted, what was measured is kept,
    2: usage.
    """
    from helpers.models.profiles import load_profile
    from helpers.speed import session

    wish = session.Wish(
        quick, _split(engines), _split(models), _whole_numbers(context), _whole_numbers(batch), new_tokens, repeats,
        precision, limit, peers or session.PEERS, vllm_python, out,
    )  # fmt: skip
    outcome = session.run(load_profile(profile), wish)
    _say((outcome.folder / "bench.md").read_text(encoding="utf-8"))
    title = "Interrupted; measured so far" if outcome.interrupted else "Results"
    _say(f"{title}: {_shortened(outcome.folder)}")
    raise typer.Exit(1 if outcome.interrupted else 0)


def _leaderboard_table(measured: Leaderboard) -> Table:
    table = Table("task", "shots", "metric", "score", "standard error", "items", box=None, pad_edge=False)
    table.title, table.title_justify = f"{measured.model}, {measured.precision}, percent", "left"
    for score in measured.scores:
        numbers = (f"{score.score:.2f}", f"{score.standard_error:.2f}", f"{score.count:,}")
        table.add_row(score.task, str(score.shots), score.metric, *numbers)
    table.add_row("average", "", "", f"{measured.average:.2f}", f"{measured.standard_error:.2f}", style="bold")
    for name, value in measured.published.items():
        table.add_row(f"{name}, published", "", "", f"{value:.2f}")
    return table


def _whole_numbers(texts: Iterable[str] | None) -> list[int]:
    parts = _split(texts)
    # isdecimal refuses signs and exponents, which int would take or which make no number of tokens.
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise WorkbookError(f"Not a whole number: {', '.join(wrong)}.")
    return [int(part) for part in parts]
