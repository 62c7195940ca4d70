"""The command that trains: a fine-tune of a profile's chat model on a file of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helpers.base.errors import choose
from helpers.base.units import PRECISIONS
from helpers.cli.workbook import _command, _ProfileOption, _say, _shortened

if TYPE_CHECKING:
    from helpers.models.formats import Message


@_command("finetune")
def _finetune(
    data: Annotated[Path, typer.Option(help="JSON Lines: each row holds a list messages, with role and content.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter. The same command resumes from there.")],
    profile: _ProfileOption = "laptop",
    *,
    held_out: Annotated[Path | None, typer.Option(help="Conversations for the held-out loss.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that are not valid, and count them.")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8 or nf4; the last two are QLoRA.")] = "nf4",
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 150,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    rank: Annotated[int, typer.Option(help="Rank of LoRA; alpha is twice the rank.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the adapter's first weights and the order of the examples.")] = 0,
) -> None:
    """Train an adapter of the profile's Falcon chat model on conversations.

    Every row is checked before the model is loaded. Exit code 0: trained, 1: the training stopped, 2: usage or data.
    """
    from helpers.models import loading
    from helpers.models.profiles import load_profile
    from helpers.training.finetuning import finetune
    from helpers.training.recipe import Recipe

    # All that can be refused is looked at first: a large model takes minutes to load.
    choose(precision, PRECISIONS, "precision")
    ref = load_profile(profile).falcon_chat
    recipe = Recipe(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, rank=rank, alpha=2 * rank, seed=seed,
        log_every=max(1, min(5, steps)), evaluate_every=max(1, min(50, steps)),
    )  # fmt: skip
    conversations = _read(data, skip_bad_rows)
    measured = _read(held_out, skip_bad_rows) if held_out else []
    loaded = loading.load(ref, precision, unpacked=True)
    done = finetune(loaded, conversations, recipe, out, held_out=measured)
    _say(f"{done.examples} replies trained on, {done.left_out} too long, {done.blank_replies} blank")
    for point in done.history[-2:]:
        loss, what = (point.loss, "loss") if point.loss is not None else (point.held_out_loss, "held-out loss")
        _say(f"step {point.step}: {what} {loss:.3f}")
    _say(f"Adapter: {_shortened(done.adapter_dir)}")


def _read(file: Path, skip_bad_rows: bool) -> list[list[Message]]:
    """The conversations of a file; what is left out is said at once."""
    from helpers.training.conversations import read_conversations

    conversations = read_conversations(file, skip_bad_rows=skip_bad_rows)
    for row in conversations.dropped[:5]:
        _say(f"left out: {row}")
    _say(f"{file.name}: {len(conversations)} conversations, {len(conversations.dropped)} bad rows left out")
    return conversations
