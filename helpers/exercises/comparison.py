"""Exercises of notebook 04: the scoring rule, Wilson's interval, McNemar's test, an item that both models fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.reading import _expected, _is_close, _number, _numbers, _other_unit, _UnreadableError
from helpers.exercises.verdict import _Exercise, _Found

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from helpers.evaluation.comparison import Side
    from helpers.evaluation.data import Item
    from helpers.exercises.verdict import Outcome

_ANSWERED, _WRONG = "right", "wrong"
_Z = 1.959964  # 95% of a normal distribution are within so many standard deviations


def _is_right(function: Callable[[str, list[str], list[str]], object]) -> Outcome:
    cases = [
        ("A goat.", ["goat"], ["saddle"], True),
        ("The goat, not the saddle", ["goat"], ["saddle"], False),
        ("GOAT, swan", ["swan", "goat"], ["kettle"], True),
        ("Goat", ["goat", "swan"], ["kettle"], False),
        ("A scapegoat", ["goat"], ["saddle"], False),
        ("", ["yes"], ["no"], False),
        ("Yes, I know.", ["yes"], ["no"], True),
    ]
    for text, answer, others, expected in cases:
        given = function(text, list(answer), list(others))
        if isinstance(given, str):
            raise _UnreadableError(_expected("True or False", given))
        if bool(given) is not expected:
            return f"For {text!r} with answer {answer} and others {others} it returns {bool(given)}."
    return None


def _wilson(function: Callable[[int, int], object]) -> Outcome:
    from helpers.base.stats import proportion

    # None and all passed are among the cases: the simple formula gives an interval of no width there.
    for passed, trials in ((63, 168), (0, 20), (7, 7), (1, 1000)):
        expected = proportion(passed, trials)
        low, high = _numbers(function(passed, trials), 2)
        if abs(low - expected.low) <= 1e-3 and abs(high - expected.high) <= 1e-3:
            continue
        case = f"For {passed} of {trials} it returns {low:.4f} to {high:.4f}"
        if low > high:
            return f"{case}. Return the lower end first."
        if _is_close(high, 100 * expected.high):
            return f"{case}, which is in percent. Return shares of 1."
        share = passed / trials
        half = _Z * (share * (1 - share) / trials) ** 0.5
        if abs(low - share + half) <= 1e-3 and abs(high - share - half) <= 1e-3:
            return f"{case}. That is the simple interval around the share, not Wilson's."
        return f"{case}, which is not right."
    return None


def _p_value(function: Callable[[int, int], object]) -> Outcome:
    from scipy.stats import binomtest

    for first, second in ((0, 5), (3, 9), (10, 10), (40, 22), (1, 0)):
        expected = float(binomtest(first, first + second).pvalue)
        given = _number(function(first, second))
        if _is_close(given, expected, 1e-6):
            continue
        case = f"For a split of {first} to {second} it returns {given:.6g}"
        if off := _other_unit(given, expected, {"in percent": 100}, 1e-6):
            return f"{off} Return a probability."
        if given > 1:
            return f"{case}, but no probability is more than 1."
        if _is_close(given, expected / 2, 1e-6):
            return f"{case}, which counts splits in one direction only."
        return f"{case}, which is not right."
    return None


def _both_fail(answer: object, sides: Mapping[str, Side], precision: str = "bf16") -> Outcome:
    from helpers.evaluation.answers import classify
    from helpers.evaluation.comparison import GREEDY, compare
    from helpers.models.loaded import Loaded

    item = _own_item(answer)
    asked = compare([item], sides, GREEDY, precision=precision)
    seen, outcomes = [], []
    for side, model in sides.items():
        text = asked.replies[side][0].text.strip()
        outcomes.append(classify(item, text))
        ref = model.ref if isinstance(model, Loaded) else model
        seen.append(f"{ref.name} says {text!r} ({outcomes[-1]}).")
    told = " ".join(seen)
    if _ANSWERED in outcomes:
        return f"{told} So they do not both fail."
    if _WRONG not in outcomes:
        # A model that never says one of the words may have understood the question all the same.
        return f"{told} Neither chose one of the words. Write an item to which at least one gives a wrong answer."
    return _Found(f"{told} One item is an anecdote: what would you need to call it a weakness?")


def _own_item(answer: object) -> Item:
    """An item that a reader could answer, and that this notebook does not ask. Raises _UnreadableError if it is not."""
    from helpers.base.files import ROOT
    from helpers.evaluation.data import Item, read_items

    try:
        item = Item(**answer) if isinstance(answer, dict) else answer
    except (TypeError, ValueError) as error:
        raise _UnreadableError(f"That is not a valid item: {error}.") from error
    if not isinstance(item, Item):
        raise _UnreadableError(_expected("an evaluation.Item", answer))
    _check_key(item)
    old = read_items(ROOT / "notebooks" / "data" / "animal_items.jsonl")
    if item.question in [one.question for one in old]:
        raise _UnreadableError("This notebook asks this question already. Write one of your own.")
    return item


def _check_key(item: Item) -> None:
    """Raise _UnreadableError if a reader of the question could not know what to choose from."""
    from helpers.evaluation.rules import names

    if not item.answer or not item.others:
        raise _UnreadableError("Give both parts of the key: the words of a right answer, and those of a wrong one.")
    options = [word for word in (*item.answer, *item.others) if word.casefold() not in ("yes", "no")]
    absent = [word for word in options if not names(item.question, word)]
    if absent:
        # Otherwise any question with an outlandish key would do.
        raise _UnreadableError(
            f"The question does not offer {absent[0]!r}, which is in the key. Name every option in it."
        )


EXERCISES = {
    "04-1": _Exercise(
        _is_right,
        (
            "A word inside a longer word is not a whole word. How do you cut a text into words?",
            "Two conditions must hold at once: one about all words of one list, one about all words of the other.",
            "Lower-case both sides before you compare.",
        ),
    ),
    "04-2": _Exercise(
        _wilson,
        (
            "Compute centre and half-width on lines of their own, each with the same divisor 1 + z²/n.",
            "Test it with 0 of 20: the lower end must be 0, and the upper end well above it.",
            "Under the root stand two terms. n is squared in one of them only.",
        ),
    ),
    "04-3": _Exercise(
        _p_value,
        (
            "How many ways are there to choose k of n items, and how likely is each way with fair coins?",
            "Sum over the splits at least as uneven on one side. Then think of the other side.",
            "What does your formula give for 10 to 10? A probability has a largest value.",
        ),
    ),
    "04-4": _Exercise(
        _both_fail,
        (
            "How does each model answer when it does not know? Does it prefer one of two words?",
            "Which answer does each of them give too often? Write a question for which that answer is wrong.",
            "Try a question with compare first, and read what the models say before you write the key.",
        ),
    ),
}
