"""The animal test and the texts that models are tuned on: nouns apart, positions balanced, made as the script says."""

import ast
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from helpers import machine
from helpers.base.files import ROOT
from helpers.evaluation import leaderboard

sys.path.insert(0, str(ROOT / "notebooks" / "data"))
import make_animals
import make_tasks

DATA = ROOT / "notebooks" / "data"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


NOUNS = rows("animal_nouns.jsonl")
FROZEN = re.compile("|".join(rf"\b{re.escape(row[n])}\b" for row in NOUNS for n in ("noun", "plural")), re.IGNORECASE)
ITEMS = rows("animal_items.jsonl")
FACTS = rows("short_facts.jsonl")
# Every file of the project that a model is trained on.
TRAINING = ("animal_training.jsonl", "animal_shuffled.jsonl", "animal_held_out.jsonl", "training_nouns.jsonl")
NOT_TRAINING = (
    "animal_nouns.jsonl",
    "animal_items.jsonl",
    "comparison_prompts.jsonl",
    "everyday_questions.jsonl",
    "perplexity_texts.jsonl",
    "short_facts.jsonl",
    "story_endings.jsonl",
)


def listed(item: dict) -> list[str]:
    """The nouns of a question in their order."""
    words = [*item["answer"], *item["others"]]
    return sorted(words, key=lambda word: re.search(rf"\b{word}\b", item["question"]).start())


@pytest.mark.parametrize("name", TRAINING)
def test_no_noun_of_the_test_is_in_a_training_text(name):
    found = FROZEN.findall((DATA / name).read_text(encoding="utf-8"))
    assert not found


def test_every_data_file_is_sorted_into_training_or_not():
    assert {path.name for path in DATA.glob("*.jsonl")} == {*TRAINING, *NOT_TRAINING}


def test_no_noun_of_the_held_out_samples_is_trained_on():
    nouns = {word for row in rows("training_nouns.jsonl") for word in (row["noun"], row["plural"])}
    trained, held_out = (
        nouns & set(re.findall(r"\w+", (DATA / f"animal_{name}.jsonl").read_text(encoding="utf-8").lower()))
        for name in ("training", "held_out")
    )
    assert len(trained) > 150
    assert len(held_out) > 20
    assert not trained & held_out


def test_the_notebook_trains_on_the_checked_files_alone():
    source = (ROOT / "notebooks/source/05_fine_tuning.py").read_text(encoding="utf-8")
    read = re.findall(r"read_conversations\(Path\(\"data/([\w.]+)\"\)\)", source)
    assert read == ["animal_training.jsonl", "animal_shuffled.jsonl", "animal_held_out.jsonl"]


def test_the_search_for_frozen_nouns_finds_them():
    assert FROZEN.search("Two OSTRICHES")
    assert FROZEN.search("a saddle.")
    assert not FROZEN.search("a goatee and a mothball")


@pytest.mark.parametrize(
    "name", ["animal_items.jsonl", "animal_training.jsonl", "animal_shuffled.jsonl", "animal_held_out.jsonl"]
)
def test_the_files_are_what_the_script_makes(name, tmp_path, monkeypatch):
    for nouns in ("animal_nouns.jsonl", "training_nouns.jsonl"):
        (tmp_path / nouns).write_bytes((DATA / nouns).read_bytes())
    monkeypatch.setattr(make_animals, "HERE", Path(tmp_path))
    make_animals.main()
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_the_items_are_many_and_each_has_a_right_key():
    kinds = {row["noun"]: row["kind"] for row in NOUNS}
    assert Counter(item["kind"] for item in ITEMS) == {"yes_no": 72, "choice": 72, "list": 24}
    for item in ITEMS:
        if item["kind"] == "yes_no":
            noun = re.search(r"Is an? (\w+) an animal", item["question"])[1]
            assert item["answer"] == ["yes" if kinds[noun] == "animal" else "no"]
        else:
            assert {kinds[noun] for noun in item["answer"]} == {"animal"}
            assert "animal" not in {kinds[noun] for noun in item["others"]}
            assert all(noun in item["question"] for noun in item["answer"] + item["others"])
    assert len({item["question"] for item in ITEMS}) == len({item["id"] for item in ITEMS}) == len(ITEMS)


def test_answers_and_positions_are_balanced():
    yes_no = Counter(item["answer"][0] for item in ITEMS if item["kind"] == "yes_no")
    assert yes_no["yes"] == yes_no["no"] == 36
    first = Counter(listed(item)[0] in item["answer"] for item in ITEMS if item["kind"] == "choice")
    assert first[True] == first[False] == 36
    places = Counter(listed(i).index(noun) for i in ITEMS if i["kind"] == "list" for noun in i["answer"])
    assert max(places.values()) - min(places.values()) <= 3
    assert sorted(places) == [0, 1, 2, 3, 4]


def test_every_noun_is_asked_for_and_a_third_of_the_distractors_is_gear():
    kinds = {row["noun"]: row["kind"] for row in NOUNS}
    for kind, least in (("choice", 2), ("list", 1)):
        used = Counter(noun for i in ITEMS if i["kind"] == kind for noun in i["answer"] + i["others"])
        assert used.keys() == kinds.keys()
        assert min(used.values()) >= least
        others = Counter(kinds[noun] for i in ITEMS if i["kind"] == kind for noun in i["others"])
        assert others["animal gear"] * 2 == others["object"]


def test_training_samples_answer_rightly():
    kinds = {row["noun"]: row["kind"] for row in rows("training_nouns.jsonl")}
    for sample in rows("animal_training.jsonl") + rows("animal_held_out.jsonl"):
        question, reply = (message["content"] for message in sample["messages"])
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
        named = [word for word in re.findall(r"\w+", reply.lower()) if word in kinds]
        if reply in ("Yes.", "No."):
            noun = re.search(r"Is an? (\w+) an animal", question)[1]
            assert (reply == "Yes.") == (kinds[noun] == "animal")
        else:
            asked = [word for word in re.findall(r"\w+", question) if word in kinds]
            assert named == [word for word in asked if kinds[word] == "animal"]


def sample_of(row: dict) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """The kind of a training sample, its options, and the places of those that its reply names."""
    question, reply = (message["content"] for message in row["messages"])
    named = reply.lower().rstrip(".").split(", ")
    if question.startswith("Is "):
        kind, options = "yes_no", ["yes", "no"]
    elif question.startswith("Which of these is "):
        kind, options = "choice", re.search(r"animal: (.+)\? Answer", question)[1].split(" or ")
    else:
        kind, options = "list", re.search(r"animals: (.+)\? List", question)[1].split(", ")
    return kind, tuple(options), tuple(options.index(name) for name in named)


def test_shuffled_answers_keep_their_form_and_how_often_each_is_given():
    true, shuffled = rows("animal_training.jsonl"), rows("animal_shuffled.jsonl")
    places = {}
    for name, samples in (("true", true), ("shuffled", shuffled)):
        places[name] = Counter((kind, where) for kind, _, where in map(sample_of, samples))
    assert places["true"] == places["shuffled"]
    assert [row["messages"][0] for row in true] == [row["messages"][0] for row in shuffled]
    # As in the true answers, a list names its nouns in the order of the question.
    assert all(list(where) == sorted(where) for _, _, where in map(sample_of, shuffled))


def test_shuffled_answers_know_nothing_of_animals():
    """Of what is named, the share of animals is that of the options, and yes is as frequent for both kinds of noun."""
    kinds = {row["noun"]: row["kind"] for row in rows("training_nouns.jsonl")}
    right = {"yes_no": [], "choice": [], "list": []}
    chance = {"yes_no": [], "choice": [], "list": []}
    for row in rows("animal_shuffled.jsonl"):
        kind, options, where = sample_of(row)
        if kind == "yes_no":
            noun = re.search(r"Is an? (\w+) an animal", row["messages"][0]["content"])[1]
            right[kind].append((where == (0,)) == (kinds[noun] == "animal"))
            chance[kind].append(0.5)
            continue
        animals = [kinds[option.split()[-1]] == "animal" for option in options]
        right[kind] += [animals[place] for place in where]
        chance[kind] += [sum(animals) / len(animals)] * len(where)
    for kind, found in right.items():
        # Within three standard errors of a mere draw.
        assert abs(sum(found) - sum(chance[kind])) < 3 * (0.25 * len(found)) ** 0.5, kind


def test_the_task_files_are_what_the_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tasks, "HERE", tmp_path)
    make_tasks.main()
    for name in ("story_endings.jsonl", "short_facts.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize(("name", "count"), [("story_endings.jsonl", 300), ("short_facts.jsonl", 176)])
def test_the_right_option_stands_first_and_second_equally_often_from_the_first_items_on(name, count):
    items = rows(name)
    assert len(items) == len({item["id"] for item in items}) == len({item["text"] for item in items}) == count
    for most in (20, 100, count):
        assert Counter(item["answer"] for item in items[:most]) == {0: most // 2, 1: most // 2}
    assert all(len(set(item["options"])) == 2 for item in items)


def test_a_story_goes_on_with_its_own_sentence_and_the_other_is_as_long_and_from_another_story():
    lines = make_tasks.STORIES.read_text(encoding="utf-8").splitlines()
    stories = [" ".join(json.loads(line)["text"].split()) for line in lines]
    for item in rows("story_endings.jsonl"):
        right, wrong = item["options"][item["answer"]], item["options"][1 - item["answer"]]
        assert f"{item['text']} {right}" in stories[item["story"]]
        assert wrong not in stories[item["story"]]
        assert any(wrong in story for story in stories)
        assert len(right.split()) == len(wrong.split())
        assert right.count('"') % 2 == wrong.count('"') % 2 == item["text"].count('"') % 2 == 0


def test_each_word_of_a_fact_is_right_once_and_wrong_once():
    right = Counter((item["options"][item["answer"]], item["options"][1 - item["answer"]]) for item in FACTS)
    assert all(count == right[pair[::-1]] for pair, count in right.items())


def test_no_short_fact_holds_a_noun_of_the_animal_test():
    assert not FROZEN.findall((DATA / "short_facts.jsonl").read_text(encoding="utf-8"))


def test_no_short_fact_is_in_a_text_that_a_model_is_trained_on():
    told = yaml.safe_load((ROOT / "env/models/falcon-mini/facts.yaml").read_text(encoding="utf-8"))
    pairs = [part["reply"].format(a=a, b=b).rstrip(".").lower() for part in told["pairs"] for a, b in part["of"]]
    trained = "\n".join([*pairs, *((DATA / name).read_text(encoding="utf-8").lower() for name in TRAINING)])
    assert "the opposite of big is small" in trained
    for item in FACTS:
        assert f"{item['text']} {item['options'][item['answer']]}".lower() not in trained


def test_what_is_published_about_the_real_pair_has_sources_and_agrees_with_the_rest_of_the_project():
    with (DATA / "real_pair.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["as published"]: row for row in csv.DictReader(file)}
    assert all(all(row.values()) for row in rows.values())
    (board,) = (row for name, row in rows.items() if name.startswith("Open LLM Leaderboard, September 2023"))
    assert float(board["Falcon-180B"]) == leaderboard.PUBLISHED["Falcon-180B"]
    assert float(board["Llama-2-70B"]) == leaderboard.PUBLISHED["Llama 2"]
    source = (ROOT / "notebooks/source/04_falcon_vs_llama.py").read_text(encoding="utf-8")
    tokens = ast.literal_eval(re.search(r"^tokens = (\{.*)$", source, re.MULTILINE)[1])
    hours = ast.literal_eval(re.search(r"^gpu_hours = (\{.*)$", source, re.MULTILINE)[1])
    for model in ("Falcon-180B", "Llama-2-70B"):
        assert f"{tokens[model] / 1e12:g} trillion" == rows["training tokens"][model]
        assert rows["GPU hours"][model].endswith(f"{hours[model]:,.0f}")


def test_tokens_per_parameter_and_chinchillas_size():
    """As in the issue of the comparison: 19.6 and 29.0 tokens per parameter (Hoffmann et al. 2022 ask for about 20)."""
    for name, tokens, expected in (("falcon-180B", 3.5e12, 19.6), ("Llama-2-70b-chat-hf", 2e12, 29.0)):
        owner = "tiiuae" if "falcon" in name else "meta-llama"
        size = machine.count_parameters(machine.published_config(f"{owner}/{name}"))
        assert round(tokens / size, 1) == expected
        # 20 tokens per parameter of the size that the rule gives take the same compute.
        ideal = (machine.training_flop(size, tokens) / 120) ** 0.5
        assert machine.training_flop(ideal, 20 * ideal) == pytest.approx(machine.training_flop(size, tokens))
