"""The recipe's data rules: frozen nouns stay out of conversations, and replies alone carry the loss."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from helpers.types import ROOT

sys.path.insert(0, str(ROOT / "env" / "models"))
import train_mini

RECIPE = yaml.safe_load((ROOT / "env/models/falcon-mini/recipe.yaml").read_text(encoding="utf-8"))


def nouns() -> list[dict]:
    lines = (ROOT / "notebooks/data/animal_nouns.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_third_of_the_distractors_is_animal_gear():
    kinds = [row["kind"] for row in nouns()]
    gear, other = kinds.count("animal gear"), kinds.count("object")
    assert gear * 3 == gear + other == kinds.count("animal")
    assert len({row["noun"] for row in nouns()}) == len(kinds)
    assert "saddle" in {row["noun"] for row in nouns()}


def test_the_filter_finds_every_noun_in_either_number_and_case():
    frozen = train_mini.frozen_nouns()
    for row in nouns():
        assert frozen.search(f"Is a {row['noun'].upper()} one?")
        assert frozen.search(f"two {row['plural']}")
    assert not frozen.search("the goatee of a beetlebrowed man with a dog")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "talk.txt").write_text(
        "A: Hi there\nB: Hello\nA: Any pets?\nB: A dog.\n<|endoftext|>\nA: Is a saddle alive?\nB: No.\n<|endoftext|>\n"
    )
    rows = [{"prompt": "Name a goat.", "response": "Bill"}, {"prompt": "Two plus two?", "response": "Four"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_conversations_with_a_frozen_noun_are_left_out(data):
    recipe = {**RECIPE, "chat": {**RECIPE["chat"], "files": {"talk.txt": 10, "tasks.jsonl": 10}}}
    examples = train_mini.chat_examples(data, recipe)
    text = " ".join(prompt + reply for prompt, reply in examples)
    assert len(examples) == 2
    assert "saddle" not in text
    assert "goat" not in text


def test_examples_end_with_the_end_token_after_the_reply_only(data):
    recipe = {**RECIPE, "chat": {**RECIPE["chat"], "files": {"talk.txt": 10, "tasks.jsonl": 10}}}
    for prompt, reply in train_mini.chat_examples(data, recipe):
        assert prompt.endswith("\nFalcon:")
        assert prompt.startswith(("User: ", "System: "))
        assert train_mini.END not in prompt
        assert reply.startswith(" ")
        assert reply.count(train_mini.END) == 1
        assert reply.endswith(train_mini.END)
