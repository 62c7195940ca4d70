"""Commands about machines: what is missing on this one, and what a model or profile needs on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.terminal import Terminal
from helpers.cli.workbook import _command, _hidden, _ProfileOption, _say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from helpers.planning.findings import Finding
    from helpers.planning.hours import Work

_ModelOption = Annotated[
    str | None, typer.Option(metavar="ID", help="Another model, such as meta-llama/Llama-2-13b-chat-hf.")
]
_GpusOption = Annotated[
    str | None, typer.Option(metavar="NxGB", help="Other GPUs: 8x80, or 4x80,2x40; for Falcon-180B or --model.")
]


@_command("doctor")
def _doctor(
    profile: _ProfileOption = "laptop",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: what is installed, what is missing, how to fix it.

    Exit code 0: the profile can run, 1: it cannot, 2: usage.
    """
    from helpers.models import profiles
    from helpers.planning import doctor

    chosen = profiles.load_profile(profile)
    findings = doctor.examine(chosen)
    failed = doctor.failures(findings)
    if as_json:
        answer = {"profile": chosen.name, "can_run": not failed, "findings": [vars(finding) for finding in findings]}
        _say(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        verdict = f"cannot run here: see {', '.join(failed)}" if failed else "can run here"
        Terminal().print(_findings(findings), Text.assemble("\n", (chosen.name, "bold"), f" {verdict}"))
    raise typer.Exit(1 if failed else 0)


@_command("plan")
def _plan(
    profile: Annotated[str | None, typer.Option(help="A name in env/profiles, or auto. Default: laptop.")] = None,
    model: _ModelOption = None,
    gpus: _GpusOption = None,
    *,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, int8 or nf4.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of context. Default: 2048.")] = None,
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

    Exit code 0: answered, also if the answer is that it does not fit, by how much, and what would. 2: usage.
    """
    from helpers.machine import memory
    from helpers.planning import output, planner, suggestions

    work = memory.Workload(batch, context, "library" if library_cache else "kv", double_quant)
    if suggest:
        asked = suggestions.suggested_for(profile, model, gpus, double_quant=double_quant, figure=figure is not None)
        found = suggestions.suggest(asked, work, precision)
        text = output.to_json(found)
        shown: Iterable[RenderableType] = [output.suggestion_table(found, work, model)]
    else:
        declared = _declared(profile) if not model and not gpus else None
        made = planner.make(profile, model, gpus, precision, work, declared)
        text = output.to_json(made)
        shown = output.tables(made)
        if figure:
            output.save_figure(made, figure)
    if as_json:
        _say(text)
    else:
        console = Terminal()
        for part in shown:
            console.print(part)
            console.print()


def _declared(name: str | None) -> Mapping[str, Sequence[Work]] | None:
    """What each notebook does with the models of a profile with GPUs."""
    from helpers.models import profiles
    from helpers.runs import execution, work

    profile = profiles.load_profile(name or DEFAULT_PROFILE)
    return work.declared_work(profile, execution.NOTEBOOKS) if profile.requires.gpus else None


def _findings(findings: Sequence[Finding]) -> Table:
    """The findings, each with what to do on a line of its own."""
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        # Text, not markup: a path or a package name with brackets would vanish as a style.
        text = Text(_hidden(finding.found))
        if finding.advice and finding.status != "ok":
            text.append(f"\n-> {_hidden(finding.advice)}", style="bold")
        table.add_row(Text(finding.status, style=colours[finding.status]), finding.name, text)
    return table
