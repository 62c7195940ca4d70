"""Commands for those who change the workbook: its rendered notebooks, its expected values, its own small models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from helpers.base.files import ROOT
from helpers.base.terminal import Terminal
from helpers.base.text import shell_word
from helpers.cli.workbook import MAINTAINERS, _command, _print_result, _say, _shortened

MODELS = ROOT / "env" / "models"
WORK = ROOT / "runs" / "train-mini"


@_command("render", MAINTAINERS)
def _render() -> None:
    """Make notebooks/*.ipynb from notebooks/source, with the outputs of a laptop run."""
    from helpers.runs import rendering

    result = rendering.render()
    _print_result(result)
    raise typer.Exit(0 if result.ok else 1)


@_command("expect", MAINTAINERS)
def _expect(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one profile.")]) -> None:
    """Update the expected values from finished runs that agree. Cited values, and other notebooks' values, are kept."""
    from helpers.runs import execution, expected, request, store

    profile = store.read_manifest(runs[0]).profile
    measured = expected.expected_from_runs(runs, request.usual_parameters(profile, execution.NOTEBOOKS))
    path = execution.NOTEBOOKS / "expected" / f"{profile}.json"
    earlier = store.read_expected(path)
    merged = expected.merge_expected(earlier, measured, runs)
    path.parent.mkdir(exist_ok=True)
    store.write_expected(path, merged.values)
    for line in merged.lines:
        _say(line)
    _say(f"{path}: {merged}")


@_command("train-mini", MAINTAINERS)
def _train_mini(
    data: Annotated[Path, typer.Option(help="Folder with the text files that the recipe names.")],
    stage: Annotated[
        list[str] | None, typer.Option(help="tokenizer, base or chat (repeatable). Default: all three.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints; the same command resumes from there.")] = WORK,
    out: Annotated[Path, typer.Option(help="Folder for the two models.")] = MODELS,
    recipe: Annotated[Path | None, typer.Option(help="A recipe other than falcon-mini's.", exists=True)] = None,
) -> None:
    """Train falcon-mini and falcon-mini-chat again, as env/models/falcon-mini/recipe.yaml says."""
    from helpers.training.miniature import training

    settings = training.read_recipe(recipe or training.RECIPE)
    training.train(data, work, settings, stage or training.STAGES, out)
    _say(f"Trained: {_shortened(out)}. To evaluate it: workbook evaluate-mini --models {shell_word(_shortened(out))}")


@_command("evaluate-mini", MAINTAINERS)
def _evaluate_mini(
    models: Annotated[Path, typer.Option(help="Folder of falcon-mini and falcon-mini-chat.")] = MODELS,
) -> None:
    """Measure falcon-mini on held-out texts and write its quality.json, its curve and its model card."""
    from helpers.models.profiles import load_profile
    from helpers.training.miniature import card

    figures = card.measure(models, load_profile("laptop").llama_chat)
    card.write(models, figures)
    table = Table("measured", "value (95% interval)")
    for name, value in figures.items():
        # How many samples there were is no measurement; quality.json and the model card tell it.
        if "samples" not in name:
            table.add_row(name, _figure(value))
    Terminal().print(table)


@_command("record-hashes", MAINTAINERS)
def _record_hashes(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of models. Default: all in env/models.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Record the files of embedded models as they are now; every load compares them with the record."""
    from helpers.base.hashes import HASHES, changes, write_hashes

    for folder in folders or sorted(path for path in MODELS.iterdir() if path.is_dir()):
        name = folder.resolve().name
        found = changes(folder, name)
        if found:
            write_hashes(folder, name)
        _say(f"{_shortened(folder / HASHES)}: {'; '.join(found) or 'unchanged'}")


def _figure(value: float | list[float]) -> str:
    return f"{value[0]} ({value[1]}-{value[2]})" if isinstance(value, list) else str(value)
