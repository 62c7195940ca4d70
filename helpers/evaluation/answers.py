"""The rules that score a reply to an item with a key: right, wrong or no answer; concise; and what guessing scores.

A rule reads only the item and the reply, so it is the same for every model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from helpers.base.text import is_blank
from helpers.evaluation.rules import names

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.evaluation.data import Item
    from helpers.generation.sampling import Reply

AnswerClass = Literal["right", "wrong", "no answer"]
_CLASSES: tuple[AnswerClass, ...] = ("right", "wrong", "no answer")
CONCISE_WORDS = 12


def is_correct(item: Item, text: str) -> bool:
    """The rule of correctness: the reply names all of the answer, none of the others, and follows the item's rules."""
    missing = [word for word in item.answer if not names(text, word)]
    wrong = [word for word in item.others if names(text, word)]
    return not missing and not wrong and item.follows_rules(text)


def is_concise(reply: Reply) -> bool:
    """The rule of conciseness: the reply ended by itself and has 1 to CONCISE_WORDS words."""
    return reply.finish_reason != "length" and 1 <= len(reply.text.split()) <= CONCISE_WORDS


def classify(item: Item, text: str) -> AnswerClass:
    """The class of a reply: right, wrong, or no answer if it names none of the item's options.

    A key without wrong options does not list all of them: there, only a blank reply is no answer.
    """
    if is_correct(item, text):
        return "right"
    answers = bool(_named(item, text)) if item.others else not is_blank(text)
    return "wrong" if answers else "no answer"


def _named(item: Item, text: str) -> tuple[str, ...]:
    """The options of an item, right and wrong, that a reply names."""
    return tuple(word for word in (*item.answer, *item.others) if names(text, word))


def _is_scored(item: Item) -> bool:
    """Whether a rule can judge a reply to this item: whether it has an answer or rules."""
    return item.scored


def _guessing_level(item: Item) -> float:
    """The chance that a guess is right: of several options one, or for a list each of them by the toss of a coin.

    0 if the key lists no wrong options: who does not know the answer has nothing to guess from.
    """
    options = len(item.answer) + len(item.others)
    if not item.others:
        return 0.0
    if len(item.answer) == 1:
        return 1 / options
    return 0.5**options


def _is_correct_and_concise(item: Item, reply: Reply) -> bool:
    # A short reply is no merit of its own: gibberish is short too.
    return is_correct(item, reply.text) and is_concise(reply)


RULES: dict[str, Callable[[Item, Reply], bool]] = {
    "correct": lambda item, reply: is_correct(item, reply.text),
    "concise": _is_correct_and_concise,
}
