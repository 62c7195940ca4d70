"""A model as the judge of replies that no rule can score, what its verdicts are worth, and win rates by kind.

A judge sees each pair of replies twice, in both orders (Zheng et al. 2023, arXiv:2306.05685). Only if it prefers the
same reply both times has it decided. It is also asked about pairs that a rule decides: that is its own test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError
from helpers.base.text import shortened
from helpers.evaluation.comparison import Comparison, Side, opened
from helpers.evaluation.options import Question, multiple_choice
from helpers.models.formats import Message

if TYPE_CHECKING:
    from pandas import DataFrame

    from helpers.base.stats import Interval
    from helpers.evaluation.data import Item

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

    ``right``: the side that alone is right by the item's key; None if there is no key, or it does not decide.
    """

    item: Item
    chosen: tuple[str, str]
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
        first, second = self.sides
        shown_first = [pair.chosen[0] == first for pair in self.pairs] + [pair.chosen[1] == second for pair in self.pairs]
        return sum(shown_first) / len(shown_first)

    @property
    def tested(self) -> tuple[int, int, int]:
        """Of the pairs that a key decides: with how many it agrees, how many it contradicts, how many it leaves open."""
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
        same = round(self.agreement.estimate * len(self.pairs))
        lines = [
            f"{self.judge} gave the same verdict in both orders for {same} of {len(self.pairs)} pairs (a coin: half).",
            f"It preferred the reply shown first in {self.first_place:.0%} of its verdicts.",
            f"Of {sum(self.tested)} pairs that a key decides, it agreed with {agreeing}, contradicted {contradicting} "
            f"and left {undecided} open.",
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
    first, second = sides or (comparison.sides[0], comparison.sides[1])
    chosen = _pairs(comparison, first, second, tested)
    if not chosen:
        raise WorkbookError("There is nothing to judge: no item without a key, and none that a key decides.")
    questions = []
    for number, _ in chosen:
        replies = [comparison.replies[side][number].text for side in (first, second)]
        questions.append(_question(comparison.items[number], replies))
        questions.append(_question(comparison.items[number], replies[::-1]))
    with opened(model, precision) as loaded:
        preferred = multiple_choice(loaded, questions).chosen
        name = loaded.ref.label
    pairs = []
    for place, (number, right) in enumerate(chosen):
        given, swapped = preferred[2 * place], preferred[2 * place + 1]
        verdicts = ((first, second)[given], (second, first)[swapped])
        pairs.append(_Pair(comparison.items[number], verdicts, right))
    return _Judged(name, (first, second), tuple(pairs))


def _pairs(comparison: Comparison, first: str, second: str, tested: int | None) -> list[tuple[int, str | None]]:
    """The numbers of the items to judge, each with the side that alone is right by its key."""
    without_key: list[tuple[int, str | None]] = []
    keyed: list[tuple[int, str | None]] = []
    right = {side: iter(comparison.verdicts(side)) if _has_key(comparison) else iter(()) for side in (first, second)}
    for number, item in enumerate(comparison.items):
        passed = [side for side in (first, second) if item.scored and next(right[side])]
        texts = {comparison.replies[side][number].text for side in (first, second)}
        if not item.scored and len(texts) > 1:
            without_key.append((number, None))
        elif len(passed) == 1:
            keyed.append((number, passed[0]))
    if tested is not None and tested < len(keyed):
        # Evenly spread, for the items are in the order of their kinds.
        keyed = [keyed[place * len(keyed) // tested] for place in range(tested)]
    return sorted(without_key + keyed)


def _has_key(comparison: Comparison) -> bool:
    return any(item.scored for item in comparison.items)


def _question(item: Item, replies: Sequence[str]) -> Question:
    first, second = (shortened(reply.strip() or "(no reply)", _REPLY_CHARACTERS) for reply in replies)
    asked = shortened(item.question, _QUESTION_CHARACTERS)
    content = JUDGE_PROMPT.format(question=asked, first=first, second=second)
    # No order is right; the chosen option is all that is read.
    return Question([Message(role="user", content=content)], ("1", "2"), 0)


def win_rates(comparison: Comparison, judged: _Judged | None = None, *, sides: tuple[str, str] | None = None) -> DataFrame:
    """How often the first side's reply beats the second's, by kind: ``rate`` with its 95% interval; a tie counts half.

    A right reply beats a wrong one; two right or two wrong ones tie. Kinds without a key are decided by the judge, if
    there is one: what it contradicts itself about is a tie. The interval is that of the paired difference (Tango 1998),
    halved and moved to a half. ``sides``: by default the first two.
    Raises WorkbookError if no item has a key.
    """
    import pandas as pd

    first, second = sides or (comparison.sides[0], comparison.sides[1])
    points: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    keyed = [item for item in comparison.items if item.scored]
    verdicts = zip(comparison.verdicts(first), comparison.verdicts(second), strict=True)
    for item, passed in zip(keyed, verdicts, strict=True):
        points.setdefault((item.kind, "key"), []).append(passed)
        points.setdefault(("all", "key"), []).append(passed)
    for pair in judged.pairs if judged else ():
        if not pair.item.scored:
            won = (pair.winner == first, pair.winner == second)
            points.setdefault((pair.item.kind, "judge"), []).append(won)
    everything = points.pop(("all", "key"))
    rows = [_rate(*group, passed) for group, passed in points.items()]
    return pd.DataFrame([*rows, _rate("all", "key", everything)])


def _rate(kind: str, decided_by: str, passed: Sequence[tuple[bool, bool]]) -> dict[str, object]:
    left, right = [first for first, _ in passed], [second for _, second in passed]
    won, lost = stats.discordant_pairs(left, right)
    row = {"kind": kind, "decided by": decided_by, "prompts": len(passed), "won": won, "lost": lost}
    row["tied"] = len(passed) - won - lost
    low, high = 0.0, 1.0
    if len(passed) > 1:
        interval = stats.paired_difference(left, right)
        low, high = (1 + interval.low) / 2, (1 + interval.high) / 2
    return {**row, "rate": (1 + (won - lost) / len(passed)) / 2, "low": low, "high": high}
