"""Scores, intervals and paired tests of two sides, by hand; replies by generation's own."""

import dataclasses
import json
import math

import pytest

from helpers import evaluation
from helpers.base import WorkbookError, paired_difference, proportion
from helpers.base.files import ROOT
from helpers.evaluation import Comparison, Item, compare
from helpers.generation import Reply, Sampling, generate
from helpers.models import Loaded, load_profile, loading

pytestmark = pytest.mark.usefixtures("one_thread")
GOAT = Item("1", "choice", "a goat or a saddle?", ("goat",), ("saddle",))
LIST = Item("2", "list", "goat, swan, kettle?", ("goat", "swan"), ("kettle",))
SHORT = Sampling(temperature=0, max_new_tokens=6)


def reply(text: str, finish_reason="end", tokens=3, seconds=1.0, first=0.5) -> Reply:
    return Reply(text, tokens, seconds, first, finish_reason)


def table(items, **texts: list[str]) -> Comparison:
    replies = {side: tuple(map(reply, said)) for side, said in texts.items()}
    return Comparison(tuple(items), replies, {side: side for side in texts}, dict.fromkeys(texts, 2**20))


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A goat.", True),
        ("GOATS", True),
        ("The answer is a goat", True),
        ("", False),
        ("A saddle.", False),
        ("A goat, not a saddle.", False),
        ("A scapegoat.", False),
        ("A goatee.", False),
    ],
)
def test_the_rule_of_correctness(text, right):
    assert evaluation.is_correct(GOAT, text) is right


def test_a_list_needs_every_animal_and_nothing_else():
    assert evaluation.is_correct(LIST, "Swans and a goat.")
    assert not evaluation.is_correct(LIST, "A goat.")
    assert not evaluation.is_correct(LIST, "goat, swan, kettle")


def test_the_rule_of_conciseness():
    assert evaluation.is_concise(reply(" ".join(["word"] * 12)))
    assert not evaluation.is_concise(reply(" ".join(["word"] * 13)))
    assert not evaluation.is_concise(reply("A goat", finish_reason="length"))
    assert not evaluation.is_concise(reply(" "))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    test = table([GOAT, GOAT, LIST], falcon=["goat", "saddle", "goat, swan"], llama=["saddle", "saddle", "no idea"])
    assert test.verdicts("falcon") == (True, False, True)
    rows = test.scores().set_index(["items", "side", "rule"])
    assert rows.loc[("all", "falcon", "correct"), ["passed", "of"]].tolist() == [2, 3]
    assert rows.loc[("choice", "falcon", "correct"), ["passed", "of"]].tolist() == [1, 2]
    assert rows.loc[("list", "llama", "correct"), ["passed", "of"]].tolist() == [0, 1]
    assert rows.loc[("choice", "falcon", "correct"), "guessing"] == 1 / 2
    # Wilson 1927 for 2 of 3 with z = 1.959964: centre (p + z²/2n)/(1 + z²/n), half-width z/(1 + z²/n)·sqrt(...)
    z, n, p = 1.959964, 3, 2 / 3
    centre, half = (p + z * z / 6) / (1 + z * z / 3), z / (1 + z * z / 3) * math.sqrt(p * (1 - p) / n + z * z / 36)
    score = test.score("falcon")
    assert (score.low, score.high) == pytest.approx((centre - half, centre + half), abs=1e-5)


@pytest.mark.parametrize(
    ("item", "text", "expected"),
    [
        (GOAT, "A goat.", "right"),
        (GOAT, "A saddle.", "wrong"),
        (GOAT, "A goat or a saddle.", "wrong"),
        (GOAT, "A horse is an animal.", "no answer"),
        (GOAT, "", "no answer"),
        (LIST, "goats and swans", "right"),
        (LIST, "A goat.", "wrong"),  # incomplete
        (LIST, "The answer to this question is:", "no answer"),
        # Without wrong options nobody can list all answers: any other word is one.
        (Item("3", "fact", "Capital?", ("Paris",)), "Rome", "wrong"),
        (Item("3", "fact", "Capital?", ("Paris",)), " \u200b", "no answer"),
    ],
)
def test_the_three_classes_of_reply(item, text, expected):
    assert evaluation.classify(item, text) == expected


def test_classes_and_guessing_by_kind_by_hand():
    fact = Item("3", "fact", "Capital?", ("Paris",))
    said = ["goat", "a horse", "swan", "Rome"]
    test = table([GOAT, GOAT, LIST, fact], falcon=said)
    assert test.kinds == ("choice", "list", "fact")
    assert test.classes("falcon") == ("right", "no answer", "wrong", "wrong")
    assert test.classes("falcon", "choice") == ("right", "no answer")
    # one of two options; each of three words by a coin; nothing to guess from
    assert [test.guessing(kind) for kind in (*test.kinds, None)] == [1 / 2, 1 / 8, 0, (1 / 2 + 1 / 2 + 1 / 8) / 4]
    rows = test.answers().set_index(["items", "side"])
    assert rows.loc[("choice", "falcon"), ["of", "right", "wrong", "no answer"]].tolist() == [2, 1, 0, 1]
    assert rows.loc[("all", "falcon"), ["right", "wrong", "no answer", "share"]].tolist() == [1, 2, 1, 0.25]


def test_gibberish_is_never_concise():
    test = table([GOAT] * 3, falcon=["Ainit.", "A saddle.", "A goat."])
    assert test.verdicts("falcon", "concise") == (False, False, True)
    assert test.score("falcon", "concise").estimate == pytest.approx(1 / 3)


def test_differences_by_kind_add_up_to_that_of_all_items():
    said = {"falcon": ["?"] * 10 + ["goat, swan"] * 2, "llama": ["goat"] * 8 + ["saddle"] * 2 + ["?"] * 2}
    test = table([GOAT] * 10 + [LIST] * 2, **said)
    rows = test.differences("falcon", "llama").set_index("items")
    assert rows["difference"].tolist() == pytest.approx([-0.8, 1, (2 - 8) / 12])
    assert rows.loc["choice", ["only falcon", "only llama"]].tolist() == [0, 8]
    assert rows["p"].tolist() == pytest.approx([2 / 2**8, 2 / 2**2, 2 * (1 + 10 + 45) / 2**10])
    # One kind alone is not repeated as all.
    assert table([GOAT] * 2, a=["goat"] * 2, b=["?"] * 2).differences("a", "b")["items"].tolist() == ["choice"]


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        ({"falcon": "mini", "llama": "smol"}, ["mini", "smol"]),
        ({"before": "mini"}, ["mini"]),
        ({"before": "mini", "after": "mini"}, ["before", "after"]),
        ({"falcon": "mini", "llama": "smol", "without": "smol"}, ["mini", "smol", "smol, without"]),
        ({"falcon": "mini", "llama": "mini"}, ["mini, falcon", "mini, llama"]),
        ({"llama": "smol", "without": "smol"}, ["smol", "smol, without"]),
        ({"a": "mini", "b": "mini", "c": "smol"}, ["mini, a", "mini, b", "smol"]),
    ],
)
def test_a_reader_sees_the_models_own_names(models, shown):
    none = dict.fromkeys(models, (reply("goat"),))
    test = Comparison((GOAT,), none, {side: f"{name} (x)" for side, name in models.items()}, {}, models)
    assert list(test.names.values()) == shown
    assert test.table().columns.tolist() == ["question", *shown]
    assert test.scores()["side"].tolist()[::2] == shown
    assert test.answers()["side"].tolist() == shown


def test_a_changed_key_changes_the_score():
    items = evaluation.read_items(ROOT / "notebooks" / "data" / "animal_items.jsonl")
    test = table(items, perfect=[", ".join(item.answer) for item in items])
    assert test.score("perfect").estimate == 1
    swapped = [Item(i.id, i.kind, i.question, i.others, i.answer) for i in items[:10]]
    assert sum(test.rescored([*swapped, *items[10:]]).verdicts("perfect")) == len(items) - 10
    with pytest.raises(ValueError, match="168 items, but 10 keys"):
        test.rescored(swapped)


def test_the_paired_difference_by_hand():
    said = {"falcon": ["goat"] * 5 + ["saddle"] * 5, "llama": ["saddle"] * 4 + ["goat"] * 2 + ["saddle"] * 4}
    difference = table([GOAT] * 10, **said).difference("falcon", "llama")
    assert (difference.only_first, difference.only_second) == (4, 1)
    assert difference.interval.estimate == pytest.approx(0.3)
    # exact binomial, 1 of 5: 2 * (1 + 5) / 32
    assert difference.p_value == pytest.approx(2 * 6 / 32)
    assert difference.interval == paired_difference([1] * 4 + [0] + [1] * 5, [0] * 4 + [1] + [1] * 5)


def test_two_sides_that_never_differ_still_leave_a_width():
    interval = table([GOAT] * 10, falcon=["goat"] * 10, llama=["goats"] * 10).difference("falcon", "llama").interval
    most = 1 - 0.025 ** (1 / 10)  # Clopper and Pearson: (1 - p)^n = 0.025
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((-most, 0, most))


def test_the_win_rate_counts_correct_before_concise_and_ties_half():
    long, wrong = "goat " * 13, "saddle " * 13
    test = table([GOAT] * 4, falcon=["goat", "goat", "saddle", "saddle"], llama=["saddle", long, "goat", wrong])
    assert test.win_rate().estimate == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert test.win_rate("llama", "falcon").estimate == pytest.approx(1 - 2.5 / 4)
    by_kind = table([GOAT] * 2 + [LIST] * 2, a=["goat"] * 2 + ["?"] * 2, b=["?"] * 2 + ["goat, swan", "?"])
    assert (by_kind.win_rate("a", "b", "choice").estimate, by_kind.win_rate("a", "b", "list").estimate) == (1, 0.25)


def test_a_win_rate_of_all_or_of_ties_alone_says_how_little_is_known():
    """B3: Student's t gave an interval of no width for both."""
    won = table([GOAT] * 12, falcon=["goat"] * 12, llama=["saddle"] * 12).win_rate()
    assert won == proportion(12, 12)
    tied = table([GOAT] * 12, falcon=["goat"] * 12, llama=["goat"] * 12).win_rate()
    most = 1 - 0.025 ** (1 / 12)  # Clopper and Pearson
    assert (tied.low, tied.estimate, tied.high) == pytest.approx((0.5 - most / 2, 0.5, 0.5 + most / 2))


def test_what_cannot_be_compared_is_said():
    with pytest.raises(WorkbookError, match="two sides"):
        table([GOAT] * 2, falcon=["goat"] * 2).win_rate()
    one = table([GOAT], falcon=["goat"], llama=["saddle"])
    for ask in (one.win_rate, lambda: one.difference("falcon", "llama")):
        with pytest.raises(WorkbookError, match="at least two items"):
            ask()


def test_items_without_an_answer_are_not_scored():
    story = Item("3", "story", "Tell me a story.")
    test = table([GOAT, story], falcon=["goat", "Once upon a time"])
    assert test.verdicts("falcon") == (True,)
    with pytest.raises(WorkbookError, match="No item has an answer"):
        table([story], falcon=["Once"]).score("falcon")
    with pytest.raises(WorkbookError, match="No item has an answer"):
        table([story], falcon=["Once"]).scores()
    with pytest.raises(WorkbookError, match=r"There is no side 'llama'\. Choose one of: falcon"):
        test.score("llama")


def test_two_comparisons_of_the_same_items_side_by_side():
    items = [GOAT, GOAT]
    both = table(items, before=["saddle"] * 2).beside(table(items, after=["goat", "?"]))
    assert both.sides == ("before", "after")
    assert both.difference("after", "before").only_first == 1
    with pytest.raises(ValueError, match="different items"):
        both.beside(table([LIST], other=["goat"]))
    with pytest.raises(ValueError, match="a side called after"):
        both.beside(table(items, after=["goat", "?"]))


def test_the_table_has_the_replies_side_by_side():
    shown = table([GOAT, LIST], falcon=[" goat ", "swan"], llama=["saddle", "none"]).table()
    assert shown["falcon"].tolist() == ["goat", "swan"]
    assert shown["llama"].tolist() == ["saddle", "none"]
    assert shown["question"].tolist() == [GOAT.question, LIST.question]


def test_speeds_are_medians():
    replies = (reply("a b", first=0.1, seconds=1.1), reply("a", first=0.3, seconds=0.7), reply("", tokens=1))
    shown = Comparison((GOAT,) * 3, {"falcon": replies}, {"falcon": "mini"}, {"falcon": 3 * 2**20}).speed()
    row = shown.loc["mini"]
    assert row["first token (s)"] == 0.3
    assert row["tokens/s"] == pytest.approx((2 / 1.0 + 2 / 0.4) / 2)
    # "a b" has 3 characters in 3 tokens at 2 tokens per second, "a" one in 3 at 5
    assert row["characters/s"] == pytest.approx((3 / 3 * 2 + 1 / 3 * 5) / 2)
    assert row["words per reply"] == 1
    assert row["weights (MiB)"] == 3


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini() -> Loaded:
    from helpers.models import load

    return load(load_profile("laptop").falcon_chat, "fp32")


def test_replies_are_generations_own_one_at_a_time_or_in_batches(mini):
    # Batches are made of similar lengths; the replies stay in the order of the questions.
    asked = ["What do you like to eat in the morning?", GOAT, "Hello!"]
    messages = [[{"role": "user", "content": p if isinstance(p, str) else p.question}] for p in asked]
    expected = [generate(mini, message, SHORT).text for message in messages]
    for batch_size in (1, 2, 5):
        found = compare(asked, {"mini": mini}, SHORT, batch_size=batch_size)
        assert [r.text for r in found.replies["mini"]] == expected
    assert found.items[0] == Item("prompt-1", "prompt", "What do you like to eat in the morning?")
    assert found.labels == {"mini": mini.ref.label}
    assert found.stored_bytes == {"mini": mini.report.stored_bytes}
    assert found.names == {"mini": "falcon-mini-chat"}


def test_a_system_message_for_every_model_is_asked_with_each_question(mini):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    found = compare(["Hello!"], {"mini": mini}, SHORT, system="Be brief.").replies["mini"][0]
    expected = generate(mini, messages, SHORT)
    assert (found.text, found.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_a_model_reference_is_loaded_for_its_turn_only(mini, monkeypatch):

    opened, unloaded = [], []
    load, unload = loading.load, loading.unload
    monkeypatch.setattr(loading, "load", lambda *a: opened.append(load(*a)) or opened[-1])
    monkeypatch.setattr(loading, "unload", lambda loaded: unloaded.append(unload(loaded)))
    found = compare(["Hello!"], {"loaded": mini, "turn": mini.ref}, SHORT, precision="fp32")
    assert found.table().loc[0, "loaded"] == found.table().loc[0, "turn"]
    assert len(opened) == len(unloaded) == 1
    assert not hasattr(opened[0], "model")
    assert hasattr(mini, "model")


def test_sides_are_loaded_together_only_where_the_profile_keeps_them_so():
    laptop = load_profile("laptop")
    refs = [laptop.falcon_chat, laptop.llama_chat]
    in_turn = dataclasses.replace(laptop, resident=(("falcon", "falcon_chat"), ("llama_chat",)))
    assert list(evaluation.sides(in_turn).values()) == refs
    assert [side.ref for side in evaluation.sides(laptop).values()] == refs


def test_nothing_to_ask_is_an_error(mini):
    for prompts in ([], "Hi"):
        with pytest.raises(WorkbookError, match="list of prompts"):
            compare(prompts, {"a": mini})
    for models in ({}, mini, {"a": "falcon-mini-chat"}):
        with pytest.raises(WorkbookError, match="models by name"):
            compare(["Hi"], models)
    with pytest.raises(WorkbookError, match="batch_size must be a whole number from 1"):
        compare(["Hi"], {"a": mini}, batch_size=0)


def test_intervals_stay_within_what_is_possible():
    few = table([GOAT] * 2, falcon=["goat", "saddle"], llama=["saddle", "saddle"])
    win, difference = few.win_rate(), few.difference("falcon", "llama").interval
    assert (win.low, win.high) == (0, 1)
    assert -1 <= difference.low < 0 < difference.high <= 1
    with pytest.raises(ValueError, match="must be a list of words"):
        Item("1", "fact", "?", answer="Paris")


GOOD = {"id": "1", "kind": "list", "question": "?", "answer": ["C++"], "others": ["Java"]}


def items_file(tmp_path, *rows: dict | str):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"kind": "list"}, "id must be a text, but is missing or null."),
        (GOOD, "line 1 has the id '1' already."),
        ({**GOOD, "id": 1}, "line 1 has the id '1' already."),
        ('{"id": "2", "id": "3", "kind": "list", "question": "?"}', "The key 'id' is there twice."),
        ({**GOOD, "id": "2", "answer": {"goat": 1}}, "answer must be a list of words, but is a mapping."),
        ({**GOOD, "id": "2", "answer": "Paris"}, "answer must be a list of words, but is a text."),
        ({**GOOD, "id": "2", "answer": ["a", 1]}, "answer is not a list of words: a word must be a text, but is int."),
        ({**GOOD, "id": "2", "others": ["\u200b"]}, "others is not a list of words: a word is blank."),
        ({**GOOD, "id": "2", "others": ["saddle "]}, "others has spaces around the word 'saddle '."),
        ({**GOOD, "id": "2", "others": ["c++"]}, "No reply can be right: c++ is in both answer and others."),
        ({**GOOD, "id": "2", "question": " \u00a0"}, "question is blank."),
        ({**GOOD, "id": "2", "reply": ["Paris"]}, "An item has no key 'reply'."),
    ],
)  # fmt: skip
def test_a_row_that_is_no_item_is_named(second, reason, tmp_path):
    """A12 A3"""
    with pytest.raises(WorkbookError) as refusal:
        evaluation.read_items(items_file(tmp_path, GOOD, second))
    assert "items.jsonl: 1 of 2 rows cannot be used as items." in str(refusal.value)
    assert f"line 2 (row 2): {reason}" in str(refusal.value)


def test_all_bad_rows_are_named_in_their_order(tmp_path):
    """A6"""
    bad = items_file(tmp_path, {**GOOD, "kind": None}, "x", GOOD, "{}")
    with pytest.raises(WorkbookError) as refusal:
        evaluation.read_items(bad)
    assert [line.split(":")[0] for line in str(refusal.value).splitlines()[1:-1]] == [
        "  line 1 (row 1)", "  line 2 (row 2)", "  line 4 (row 4)",
    ]  # fmt: skip


def test_a_word_that_ends_with_a_sign_is_found():
    assert evaluation.names("It is written in C++.", "C++")
    assert not evaluation.names("It is written in C++11.", "C++")


def test_two_items_with_one_id_or_a_blank_prompt_are_refused_before_a_model_is_loaded():
    """A12 A3: the models are not even there."""
    ref = dataclasses.replace(load_profile("laptop").falcon, id="env/models/no-such-model")
    with pytest.raises(WorkbookError, match="the same id: 1"):
        compare([GOAT, dataclasses.replace(LIST, id="1")], {"a": ref})
    with pytest.raises(WorkbookError, match="Prompt 2 cannot be asked: question is blank"):
        compare(["Hi", "\u200b"], {"a": ref})


def test_texts_are_read_from_their_key_and_blank_ones_named(tmp_path):
    """A5 A3"""
    path = items_file(tmp_path, {"text": "a\u2028b", "source": "x"}, {"text": "c"})
    assert evaluation.read_texts(path) == ["a\u2028b", "c"]
    with pytest.raises(WorkbookError, match=r"line 2 \(row 2\): text is blank"):
        evaluation.read_texts(items_file(tmp_path, {"text": "a"}, {"text": "\ufeff"}))
