"""What the exercises' answers are measured on: the models that a notebook has in memory at its end."""

import tempfile
from pathlib import Path

import pytest

from helpers import models, training
from helpers.base.files import ROOT

DATA = ROOT / "notebooks" / "data"


@pytest.fixture(scope="session")
def laptop():
    return models.load_profile("laptop")


@pytest.fixture(scope="session")
def base_model(laptop):
    return models.load(laptop.falcon, "bf16")


@pytest.fixture(scope="session")
def chat_model(laptop):
    return models.load(laptop.falcon_chat, "bf16")


@pytest.fixture(scope="session")
def sides(laptop, chat_model):
    return {"falcon": chat_model, "llama": models.load(laptop.llama_chat, "bf16")}


@pytest.fixture(scope="session")
def measured_on(request):
    """What the check of an exercise is given besides the answer, loaded when it is first needed."""
    names = {"01-4": {"model": "base_model"}, "02-4": {"model": "base_model"}}
    names |= {"03-4": {"model": "chat_model"}, "04-4": {"sides": "sides"}}

    def of(exercise):
        wanted = names.get(exercise, {})
        return {argument: request.getfixturevalue(fixture) for argument, fixture in wanted.items()}

    return of


@pytest.fixture(scope="session")
def held_out_loss(laptop):
    """The held-out loss of rank 1, trained as the notebook's text says."""
    loaded = models.load(laptop.falcon_chat, "nf4", unpacked=True)
    recipe = training.Recipe(steps=12, batch_size=8, warmup_steps=2, rank=1, alpha=2, evaluate_every=12)
    train, held_out = (
        training.read_conversations(DATA / f"animal_{name}.jsonl") for name in ("training", "held_out")
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tuned = training.finetune(loaded, train, recipe, Path(folder), held_out=held_out[:40])
    return tuned.history[-1].held_out_loss
