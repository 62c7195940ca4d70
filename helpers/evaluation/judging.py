"""A model as the judge of replies that no rule can score, what its verdicts are worth, and win rates by kind.

A judge sees each pair of replies twice, in both orders (Zheng et al. 2023, arXiv:2306.05685). Only if it prefers the
same reply both times has it decided. It is also asked about pairs that a rule decides: that is its own test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError
from helpers.base.text import shortened
from helpers.evaluation.answers import is_correct
from helpers.evaluation.comparison import Comparison, Side, opened
from helpers.evaluation.data import Item
from helpers.evaluation.options import Question, multiple_choice
from helpers.models.formats import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import DataFrame

    from helpers.base.stats import Interval

_QUESTION_CHARACTERS, _REPLY_CHARACTERS = 1500, 1200  # so that both replies fit into a context of 2,048 tokens
_COIN = 0.5
JUDGE_PROMPT = """Compare two replies to the same request.

Request: {question}

Reply 1: {first}

Reply 2: {second}

Which reply is better? Answer with its number only, 1 or 2."""


@dataclass(frozen=True)
class _Pair:
    """What a judge said about two replies. ``chosen``: the preferred side in the given order, and with the two swapped.

    ``leans``: the side that it finds likelier over both orders together, which cancels a preference for a place; None
    if neither. ``right``: the side that alone is right by the item's key; None if there is no key.
    """

    item: Item
    chosen: tuple[str, str]
    leans: str | None
    right: str | None

    @property
    def winner(self) -> str | None:
        """The side that the judge prefers in both orders; None if it contradicts itself."""
        return self.chosen[0] if self.chosen[0] == self.chosen[1] else None


@dataclass(frozen=True)
class _Judged:
    """The verdicts of a judge about two sides; ``judge`` is the name of its model."""

    judge: str
    sides: tuple[str, str]
    pairs: tuple[_Pair, ...]

    @property
    def agreement(self) -> Interval:
        """The share of pairs in which both orders give the same verdict. Tossing coins, it would be a half."""
        return stats.proportion(len([pair for pair in self.pairs if pair.winner]), len(self.pairs))

    @property
    def first_place(self) -> float:
        """How often the judge preferred the reply that it saw first. Without a preference for a place: a half."""
        shown_first = 0
        for pair in self.pairs:
            shown_first += [given == shown for given, shown in zip(pair.chosen, self.sides, strict=True)].count(True)
        return shown_first / (2 * len(self.pairs))

    @property
    def tested(self) -> tuple[int, int, int]:
        """Of the pairs that a key decides: how many it decides as the key does, otherwise, and not at all."""
        keyed = [pair for pair in self.pairs if pair.right]
        agreeing = len([pair for pair in keyed if pair.winner == pair.right])
        undecided = len([pair for pair in keyed if pair.winner is None])
        return agreeing, len(keyed) - agreeing - undecided, undecided

    @property
    def better_than_a_coin(self) -> bool:
        """Whether the pairs with a key show it: the whole interval of its right verdicts lies above a half."""
        agreeing, contradicting, _ = self.tested
        decided = agreeing + contradicting
        return decided > 0 and stats.proportion(agreeing, decided).low > _COIN

    def summary(self) -> str:
        """What the verdicts are worth, in sentences that follow from them."""
        agreeing, contradicting, undecided = self.tested
        same = len([pair for pair in self.pairs if pair.winner])
        leaning = len([pair for pair in self.pairs if pair.right and pair.leans == pair.right])
        lines = [
            f"{self.judge} gave the same verdict in both orders for {same} of {len(self.pairs)} pairs (a coin: half).",
            f"It preferred the reply shown first in {self.first_place:.0%} of its verdicts.",
            f"Of {sum(self.tested)} pairs that a key decides, it agreed with {agreeing}, contradicted {contradicting} "
            f"and left {undecided} open; over both orders together it leans to the right reply in {leaning}.",
        ]
        if self.better_than_a_coin:
            lines.append("On these it is better than a coin, so its verdicts on the others count for something.")
        else:
            lines.append("That does not show it to be better than a coin: its verdicts on the others mean nothing.")
        return "\n".join(lines)


def judge(
    comparison: Comparison,
    model: Side,
    *,
    tested: int | None = None,
    sides: tuple[str, str] | None = None,
    precision: str = "bf16",
) -> _Judged:
    """Ask a model which of two replies is better, for each item without a key and for those that a key decides.

    Its preference is the likelier of the answers "1" and "2", so it never fails to answer. ``tested`` limits the pairs
    with a key, evenly spread over the items; None takes all of them. ``sides``: by default the first two. Pairs of
    equal replies are left out. Raises WorkbookError if there are fewer than two sides or no pair.
    """
    if len(comparison.sides) < 2:
        raise WorkbookError("A judge compares two sides, but this comparison has only one.")
    both = sides or (comparison.sides[0], comparison.sides[1])
    chosen = _to_judge(comparison, both, tested)
    if not chosen:
        raise WorkbookError("There is nothing to judge: no item without a key, and none that a key decides.")
    questions = []
    for number, _ in chosen:
        replies = [comparison.replies[side][number].text for side in both]
        questions.append(_question(comparison.items[number], replies))
        questions.append(_question(comparison.items[number], replies[::-1]))
    with opened(model, precision) as loaded:
        likelihoods = multiple_choice(loaded, questions).log_likelihoods
        name = loaded.ref.name
    pairs = []
    for place, (number, right) in enumerate(chosen):
        given, swapped = likelihoods[2 * place : 2 * place + 2]
        pairs.append(_pair(comparison.items[number], both, given, swapped, right))
    return _Judged(name, both, tuple(pairs))


def _pair(
    item: Item, sides: tuple[str, str], given: Sequence[float], swapped: Sequence[float], right: str | None
) -> _Pair:
    """The verdicts from the log-likelihoods of "1" and "2" in the given order and in the other."""
    first, second = sides
    chosen = (first if given[0] >= given[1] else second, second if swapped[0] >= swapped[1] else first)
    lean = given[0] - given[1] + swapped[1] - swapped[0]
    leans = None
    if lean:
        leans = first if lean > 0 else second
    return _Pair(item, chosen, leans, right)


def _to_judge(comparison: Comparison, sides: tuple[str, str], tested: int | None) -> list[tuple[int, str | None]]:
    """The numbers of the items to judge, each with the side that alone is right by its key."""
    without_key: list[tuple[int, str | None]] = []
    keyed: list[tuple[int, str | None]] = []
    for number, item in enumerate(comparison.items):
        texts = [comparison.replies[side][number].text for side in sides]
        if right := _right_side(item, sides, texts):
            keyed.append((number, right))
        elif not item.scored and texts[0] != texts[1]:
            without_key.append((number, None))
    if tested is not None and tested < len(keyed):
        # Evenly spread, for the items are in the order of their kinds.
        keyed = [keyed[place * len(keyed) // tested] for place in range(tested)]
    return sorted(without_key + keyed)


def _right_side(item: Item, sides: tuple[str, str], texts: Sequence[str]) -> str | None:
    """The side that alone is right by the item's key; None if it has none, or both are right or wrong."""
    first, second = (is_correct(item, text) for text in texts)
    if not item.scored or first == second:
        return None
    return sides[0] if first else sides[1]


def _question(item: Item, replies: Sequence[str]) -> Question:
    first, second = (shortened(reply.strip() or "(no reply)", _REPLY_CHARACTERS) for reply in replies)
    asked = shortened(item.question, _QUESTION_CHARACTERS)
    content = JUDGE_PROMPT.format(question=asked, first=first, second=second)
    # No order is right; the chosen option is all that is read.
    return Question([Message(role="user", content=content)], ("1", "2"), 0)


def win_rates(
    comparison: Comparison, judged: _Judged | None = None, *, sides: tuple[str, str] | None = None
) -> DataFrame:
    """How often the first side's reply beats the second's, by kind: ``rate`` with its 95% interval; a tie counts half.

    A right reply beats a wrong one; two right or two wrong ones tie. Prompts without a key are decided by the judge, if
    there is one; where it contradicts itself, they tie. The interval is that of the paired difference (Tango 1998),
    halved and moved to a half; its ends do not leave 0 to 1. ``sides``: by default the first two.
    Raises WorkbookError if no item has a key.
    """
    import pandas as pd

    first, second = sides or (comparison.sides[0], comparison.sides[1])
    outcomes: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    keyed = [item for item in comparison.items if item.scored]
    everything = list(zip(comparison.verdicts(first), comparison.verdicts(second), strict=True))
    for item, passed in zip(keyed, everything, strict=True):
        outcomes.setdefault((item.kind, "key"), []).append(passed)
    for pair in judged.pairs if judged else ():
        if not pair.item.scored:
            outcomes.setdefault((pair.item.kind, "judge"), []).append((pair.winner == first, pair.winner == second))
    outcomes["all", "key"] = everything
    names = [f"{comparison.names[side]} better" for side in (first, second)]
    rows = [{"kind": kind, "by": by} | _rate(passed, names) for (kind, by), passed in outcomes.items()]
    return pd.DataFrame(rows)


def _rate(passed: Sequence[tuple[bool, bool]], names: Sequence[str]) -> dict[str, float]:
    left, right = [first for first, _ in passed], [second for _, second in passed]
    won, lost = stats.discordant_pairs(left, right)
    row: dict[str, float] = {"prompts": len(passed), names[0]: won, names[1]: lost, "tied": len(passed) - won - lost}
    low, high = 0.0, 1.0
    # One prompt says nothing about the next.
    if len(passed) > 1:
        interval = stats.paired_difference(left, right)
        low, high = (1 + interval.low) / 2, (1 + interval.high) / 2
    return row | {"rate": (1 + (won - lost) / len(passed)) / 2, "low": low, "high": high}
