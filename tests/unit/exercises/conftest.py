"""What the exercises' answers are measured on: the models that a notebook has in memory at its end."""

import pytest
from exercise_cells import DATA, MODULES, SOLUTIONS, without_check

from helpers import models, training


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
def measured_choice():
    """What the solution of 05-4 finds: the rank, and the held-out loss of each rank that it trains."""
    namespace = dict(MODULES)
    for variable, file in (("train", "animal_training"), ("held_out", "animal_held_out")):
        namespace[variable] = training.read_conversations(DATA / f"{file}.jsonl")
    exec(without_check(SOLUTIONS["05-4"])[0], namespace)
    return namespace["choice"]
