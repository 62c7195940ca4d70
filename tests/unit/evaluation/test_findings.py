"""The sentences about a comparison change with its replies, and the controls score without reading the questions."""

import dataclasses
import random

import pytest

from helpers import evaluation
from helpers.base.files import ROOT
from helpers.evaluation import Comparison
from helpers.evaluation.options import _MultipleChoice
from helpers.generation import Reply, Sampling, generate
from helpers.models import load, load_profile

ITEMS = tuple(evaluation.read_items(ROOT / "notebooks" / "data" / "animal_items.jsonl"))
NAMES = {"falcon": "mini", "llama": "smol"}


def compared(falcon, llama, items=ITEMS) -> Comparison:
    """A comparison whose replies two functions of the item make."""
    replies = {}
    for side, says in (("falcon", falcon), ("llama", llama)):
        replies[side] = tuple(Reply(says(item), 3, 1.0, 0.5, "end") for item in items)
    return Comparison(items, replies, NAMES, dict.fromkeys(NAMES, 1), NAMES)


def found(falcon, llama, **likelihood) -> tuple[str, ...]:
    return evaluation.findings(compared(falcon, llama), "falcon", "llama", **likelihood).sentences


def right(item):
    return ", ".join(item.answer)


def gibberish(item):
    return "Answer is a thing."


def says(word, otherwise=gibberish):
    return lambda item: word if item.kind == "yes_no" else otherwise(item)


def only(kind):
    return lambda item: right(item) if item.kind == kind else "?"


def guess(seed):
    """One option at random, the same for the same item and seed."""
    return lambda item: random.Random(f"{seed} {item.id}").choice([*item.answer, *item.others])


def test_a_constant_answer_is_found_and_wins_nothing():
    """As on the laptop: one model always says no, the other never says yes or no."""
    text = "\n".join(found(gibberish, says("No, it is not.")))
    assert "Over all 168 items smol has more right than mini: 36 against 0 (p = 2.9e-11)." in text
    assert "smol gives the same answer, 'no', to every yes_no item: that is right in 36 of 72, whatever" in text
    assert "mini gives no answer to 72 of 72 yes_no items." in text
    assert "No difference is detected in choice (0 and 0 of 72 right, p = 1) and list (0 and 0 of 24" in text
    assert "So all of the difference that can be detected comes from yes_no." in text
    assert "Neither scores above guessing in yes_no, choice and list." in text
    assert text.endswith(
        "Which is better? In yes_no smol has more right, but always says 'no', and mini mostly gives no answer; "
        "so nothing here shows that either is better."
    )


def test_the_sides_change_places_with_their_replies():
    text = found(says("No, it is not."), gibberish)[-1]
    assert text.startswith(
        "Which is better? In yes_no mini has more right, but always says 'no', and smol mostly gives"
    )


def test_equal_models_are_not_told_apart():
    for falcon, llama in ((right, right), (gibberish, gibberish), (guess(1), guess(2))):
        sentences = found(falcon, llama)
        assert sentences[0].startswith("Over all 168 items no difference is detected: mini has ")
        assert sentences[-1] == "Which is better? These items do not tell the two apart."


def test_a_better_model_is_called_better_where_it_is():
    sentences = found(right, guess(3))
    assert sentences[-1] == "Which is better? mini is better at yes_no, choice and list."
    assert "mini scores above guessing in yes_no, choice and list; the other one does in none." in sentences
    better_at_choices = found(gibberish, only("choice"))
    assert better_at_choices[-1] == "Which is better? smol is better at choice."
    assert "So all of the difference that can be detected comes from choice." in better_at_choices
    each = found(says("?", right), says("yes", guess(4)))[-1]
    assert each.startswith("Which is better? mini is better at choice and list; in yes_no smol has more right, but alw")


@pytest.mark.parametrize(
    ("falcon", "llama", "better"),
    [
        (right, gibberish, "mini"),
        (gibberish, right, "smol"),
        (right, right, "neither"),
        (gibberish, says("No."), "neither"),
        (
            lambda i: right(i) if i.kind == "choice" else "?",
            lambda i: right(i) if i.kind == "list" else "?",
            "mini and smol",
        ),
    ],
)
def test_the_better_side_by_name(falcon, llama, better):
    conclusion = evaluation.findings(compared(falcon, llama), "falcon", "llama")
    assert conclusion.better == better
    assert str(conclusion).splitlines()[-1] == f"- {conclusion.sentences[-1]}"


def test_a_guesser_against_silence_is_no_better():
    last = found(gibberish, guess(5))[-1]
    assert "In yes_no smol has more right, but scores no better than a guess, and mini mostly gives no answer" in last
    assert last.endswith("so nothing here shows that either is better.")


def test_many_kinds_of_few_items_can_decide_together():
    """Two items of each of ten kinds: no kind alone can tell (p of 2 against 0 is 0.5), all of them can."""
    kinds = [dataclasses.replace(item, id=str(n), kind=f"kind {n // 2}") for n, item in enumerate(ITEMS[100:120])]
    conclusion = evaluation.findings(compared(right, gibberish, tuple(kinds)), "falcon", "llama")
    assert "No kind alone shows the difference; only all items together do." in conclusion.sentences
    last = "Which is better? All items together favour mini, though no kind alone does."
    assert (conclusion.sentences[-1], conclusion.better) == (last, "mini")


def test_scores_where_a_side_answers_are_given_as_such():
    def half(item):
        return right(item) if int(item.id[-1]) % 2 else "?"

    text = "\n".join(found(half, right))
    assert (
        "Of the choice items that each one answers, mini has 36 of 36 right and smol has 72 of 72 right; these" in text
    )


def test_one_kind_alone_is_told_once():
    choices = tuple(item for item in ITEMS if item.kind == "choice")
    sentences = evaluation.findings(compared(right, gibberish, choices), "falcon", "llama").sentences
    assert not [sentence for sentence in sentences if "comes from" in sentence]
    assert sentences[-1] == "Which is better? mini is better at choice."


def choices(correct: int, of: int = 72) -> _MultipleChoice:
    values = [(0.0, -1.0)] * correct + [(-1.0, 0.0)] * (of - correct)
    return _MultipleChoice(tuple(values), (0,) * of)


def test_the_likelihoods_are_judged_by_their_control():
    """54 of 72 after the question are nothing if a greeting gives 50, and a finding if it gives 30."""
    asked = {"falcon": choices(54), "llama": choices(36)}
    weak = found(guess(1), guess(2), asked=asked, greeted={**asked, "falcon": choices(50)})
    text = "By likelihood mini has 54 of 72 right, and 50 after only a greeting (p = 0.12), so nothing shows that"
    assert any(sentence.startswith(text) for sentence in weak)
    assert "mini has more right in choice by likelihood (54 and 36 of 72 right, p = 7.6e-06)." in weak
    assert "in choice by likelihood mini has more right, but is no better than after a greeting" in weak[-1].lower()
    good = found(guess(1), guess(2), asked=asked, greeted={**asked, "falcon": choices(30)})
    assert good[-1] == "Which is better? mini is better at choice by likelihood."


@pytest.mark.usefixtures("one_thread")
def test_the_controls_answer_without_reading():
    mini = load(load_profile("laptop").falcon_chat, "fp32")
    short = Sampling(temperature=0, max_new_tokens=6)
    test = dataclasses.replace(compared(right, right), replies={"falcon": compared(right, right).replies["falcon"]})
    controls = evaluation.controls(test, {"falcon": mini}, short)
    assert controls.names == {
        "same_answer": "always the same answer", "falcon_greeted": "falcon-mini-chat, only greeted"
    }  # fmt: skip
    # "yes" for half of the questions; no other answer fits more than a few items
    assert controls.score("same_answer", kind="yes_no").estimate == 0.5
    assert controls.score("same_answer", kind="list").estimate == 1 / 24
    greeting = generate(mini, [{"role": "user", "content": evaluation.GREETING}], short)
    assert {reply.text for reply in controls.replies["falcon_greeted"]} == {greeting.text}
    assert controls.classes("falcon_greeted").count("no answer") == len(ITEMS)
    assert test.beside(controls).sides == ("falcon", "same_answer", "falcon_greeted")


def test_one_right_answer_is_not_above_guessing_where_nothing_can_be_guessed():
    """A key without wrong options has no guessing level: one of twelve would be above it, and would say nothing."""
    items = tuple(evaluation.Item(f"i{n}", "fact", f"Question {n}?", answer=("Paris",)) for n in range(12))
    test = compared(lambda item: "Paris." if item.id == "i0" else "?", gibberish, items)
    sentences = evaluation.findings(test, "falcon", "llama").sentences
    assert "No kind here has a guessing level." in sentences
    mixed = compared(lambda item: "Paris." if item.id == "i0" else "?", gibberish, (*items, *ITEMS))
    assert "Neither scores above guessing in yes_no, choice and list." in evaluation.findings(mixed, "falcon", "llama")
