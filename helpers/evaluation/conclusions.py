"""Say in sentences what a comparison of two models found. Every sentence is made from the numbers.

The question is which model is better. A higher score alone does not answer it: it may come from one kind of item, from
an answer that is always the same, or from a model that gives no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.evaluation.answers import _is_scored, _named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from helpers.evaluation.comparison import Comparison
    from helpers.evaluation.options import _MultipleChoice

_SIGNIFICANT = 0.05  # of p-values: the usual convention


@dataclass(frozen=True)
class _SideOfKind:
    """What one side did with the items of a kind.

    ``always`` is the one answer that it names in every item ("" if they differ), ``above_guessing`` whether it has more
    right than a guess would by chance.
    """

    name: str
    right: int
    unanswered: int
    always: str
    above_guessing: bool

    @property
    def knows(self) -> bool:
        """Whether the score can come from reading the questions."""
        return self.above_guessing and not self.always


@dataclass(frozen=True)
class _Kind:
    """What two sides did with the items of one kind, or of one way of scoring them."""

    name: str
    count: int
    p_value: float
    sides: tuple[_SideOfKind, _SideOfKind]

    @property
    def detected(self) -> bool:
        """Whether the two sides differ by more than chance explains."""
        return self.p_value < _SIGNIFICANT

    @property
    def better(self) -> _SideOfKind:
        """The side with more right answers; of equal ones the first."""
        return max(self.sides, key=lambda side: side.right)

    @property
    def worse(self) -> _SideOfKind:
        """The other side."""
        return self.sides[1] if self.better is self.sides[0] else self.sides[0]

    @property
    def earned(self) -> bool:
        """Whether the better side is better, and cannot be so without reading the questions."""
        return self.detected and self.better.knows

    def counts(self) -> str:
        """The numbers behind a sentence, in brackets."""
        first, second = self.sides
        return f"{self.name} ({first.right} and {second.right} of {self.count} right, p = {self.p_value:.2g})"


@dataclass(frozen=True)
class _Findings:
    """What a comparison found, in sentences; they show themselves as a list.

    ``better`` names the better side, both if each is better at something, or "neither".
    """

    sentences: tuple[str, ...]
    better: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.sentences)

    def __str__(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self.sentences)

    __repr__ = __str__


def findings(
    test: Comparison,
    first: str,
    second: str,
    asked: Mapping[str, _MultipleChoice] | None = None,
    greeted: Mapping[str, _MultipleChoice] | None = None,
) -> _Findings:
    """What a comparison found about two of its sides, in sentences; the last one says which of them is better.

    ``asked`` and ``greeted`` are each side's choices by likelihood, after the question and after a greeting alone
    (give both or neither). Raises WorkbookError as ``Comparison.difference`` does.
    """
    kinds = [_of_kind(test, (first, second), kind) for kind in test.kinds]
    together = _of_kind(test, (first, second), None)
    sentences = [_overall(together), *_by_kind(kinds, together), *_how(kinds), _against_guessing(test, kinds)]
    if asked and greeted:
        by_likelihood = _by_likelihood(test, (first, second), asked, greeted)
        sentences += _likelihood(by_likelihood, asked, greeted, (first, second))
        kinds.append(by_likelihood)
    sentences.append(_verdict(kinds, together))
    # If no kind alone tells the two apart, all items together still may.
    deciding = [kind for kind in kinds if kind.detected] or [together]
    better = dict.fromkeys(kind.better.name for kind in deciding if kind.earned)
    return _Findings(tuple(sentences), " and ".join(better) or "neither")


def _of_kind(test: Comparison, sides: tuple[str, str], kind: str | None) -> _Kind:
    p_value = test.difference(*sides, kind=kind).p_value
    first, second = (_side_of_kind(test, side, kind) for side in sides)
    return _Kind(kind or "all kinds", len(test.verdicts(sides[0], kind=kind)), p_value, (first, second))


def _side_of_kind(test: Comparison, side: str, kind: str | None) -> _SideOfKind:
    classes = test.classes(side, kind)
    right = classes.count("right")
    above = _is_above(right, len(classes), test.guessing(kind))
    return _SideOfKind(test.names[side], right, classes.count("no answer"), _always(test, side, kind), above)


def _is_above(right: int, count: int, guessing: float) -> bool:
    """Whether so many right answers are more than guesses reach by chance (binomial test, one-sided).

    If the chance differs from item to item, the test with its mean is on the safe side (Hoeffding 1956).
    """
    from scipy.stats import binomtest

    if guessing == 0:
        return right > 0
    return float(binomtest(right, count, guessing, alternative="greater").pvalue) < _SIGNIFICANT


def _always(test: Comparison, side: str, kind: str | None) -> str:
    """The answer that a side gives to every item whatever it asks; "" if there is none, or one key fits all items."""
    answers, keys = set(), set()
    for item, reply in zip(test.items, test.replies[side], strict=True):
        if _is_scored(item) and kind in (None, item.kind):
            answers.add(_named(item, reply.text))
            keys.add(item.answer)
    if len(answers) > 1 or len(keys) == 1:
        return ""
    return ", ".join(answers.pop())


def _overall(together: _Kind) -> str:
    better, worse = together.better, together.worse
    if together.detected:
        return (
            f"Over all {together.count} items {better.name} has more right than {worse.name}: "
            f"{better.right} against {worse.right} (p = {together.p_value:.2g})."
        )
    first, second = together.sides
    return (
        f"Over all {together.count} items no difference is detected: {first.name} has {first.right} right, "
        f"{second.name} {second.right} (p = {together.p_value:.2g})."
    )


def _by_kind(kinds: Sequence[_Kind], together: _Kind) -> list[str]:
    """Where the difference comes from, if there are several kinds of items."""
    if len(kinds) == 1:
        return []
    same = [kind for kind in kinds if not kind.detected]
    different = [kind for kind in kinds if kind.detected]
    sentences = []
    if same:
        sentences.append(f"No difference is detected in {_listed([kind.counts() for kind in same])}.")
    for kind in different:
        sentences.append(f"{kind.better.name} has more right in {kind.counts()}.")
    if together.detected:
        sentences += _source(same, different)
    return sentences


def _source(same: Sequence[_Kind], different: Sequence[_Kind]) -> list[str]:
    """The kinds from which a difference over all items comes; nothing if it shows in each of them."""
    if not different:
        return ["No kind alone shows the difference; only all items together do."]
    if not same:
        return []
    names = _listed([kind.name for kind in different])
    return [f"So all of the difference that can be detected comes from {names}."]


def _how(kinds: Sequence[_Kind]) -> list[str]:
    """How the sides answer, where that explains a score: always alike, or mostly not at all."""
    sentences = []
    for kind in kinds:
        sentences += _where_answered(kind)
        for side in kind.sides:
            if side.always:
                sentences.append(
                    f"{side.name} gives the same answer, {side.always!r}, to every {kind.name} item: "
                    f"that is right in {side.right} of {kind.count}, whatever is asked."
                )
            elif 2 * side.unanswered >= kind.count:
                sentences.append(f"{side.name} gives no answer to {side.unanswered} of {kind.count} {kind.name} items.")
    return sentences


def _where_answered(kind: _Kind) -> list[str]:
    """The scores over the items that a side answers, if one of them leaves many out; each answers other items."""
    answered = [kind.count - side.unanswered for side in kind.sides]
    if min(answered) == 0 or min(answered) > 0.75 * kind.count or kind.better.right == 0:
        return []
    parts = []
    for side, count in zip(kind.sides, answered, strict=True):
        parts.append(f"{side.name} has {side.right} of {count} right")
    return [f"Of the {kind.name} items that each one answers, {_listed(parts)}; these are not the same items."]


def _against_guessing(test: Comparison, kinds: Sequence[_Kind]) -> str:
    # Where nothing can be guessed, one right answer of many is "above guessing", and says nothing.
    kinds = [kind for kind in kinds if test.guessing(kind.name) > 0]
    if not kinds:
        return "No kind here has a guessing level."
    parts = [*_above_guessing(kinds, 0), *_above_guessing(kinds, 1)]
    if not parts:
        return f"Neither scores above guessing in {_listed([kind.name for kind in kinds])}."
    if len(parts) == 1:
        parts.append("the other one does in none")
    return f"{'; '.join(parts)}."


def _above_guessing(kinds: Sequence[_Kind], place: int) -> list[str]:
    """In which kinds a side scores above guessing, as a clause; none if there is no such kind."""
    above = [kind.name for kind in kinds if kind.sides[place].above_guessing]
    return [f"{kinds[0].sides[place].name} scores above guessing in {_listed(above)}"] if above else []


def _by_likelihood(
    test: Comparison,
    sides: tuple[str, str],
    asked: Mapping[str, _MultipleChoice],
    greeted: Mapping[str, _MultipleChoice],
) -> _Kind:
    """The choices by likelihood as one more kind; to know more than a guess is to be better than when only greeted."""
    found = []
    for side in sides:
        right, control = sum(asked[side].correct), sum(greeted[side].correct)
        reads = right > control and stats.mcnemar(asked[side].correct, greeted[side].correct) < _SIGNIFICANT
        found.append(_SideOfKind(test.names[side], right, 0, "", reads))
    p_value = stats.mcnemar(asked[sides[0]].correct, asked[sides[1]].correct)
    return _Kind("choice by likelihood", len(asked[sides[0]].answers), p_value, (found[0], found[1]))


def _likelihood(
    kind: _Kind,
    asked: Mapping[str, _MultipleChoice],
    greeted: Mapping[str, _MultipleChoice],
    sides: tuple[str, str],
) -> list[str]:
    sentences = []
    for key, side in zip(sides, kind.sides, strict=True):
        p_value = stats.mcnemar(asked[key].correct, greeted[key].correct)
        control = sum(greeted[key].correct)
        reads = "so the question helps it" if side.knows else "so nothing shows that the question helps it"
        sentences.append(
            f"By likelihood {side.name} has {side.right} of {kind.count} right, and {control} after only a greeting "
            f"(p = {p_value:.2g}), {reads}."
        )
    what = f"{kind.better.name} has more right in" if kind.detected else "No difference between the two is detected in"
    return [*sentences, f"{what} {kind.counts()}."]


def _verdict(kinds: Sequence[_Kind], together: _Kind) -> str:
    """Which of the two is better: a side that has more right, and cannot have it without reading the questions."""
    better: dict[str, list[str]] = {}
    hollow = []
    for kind in kinds:
        if kind.earned:
            better.setdefault(kind.better.name, []).append(kind.name)
        elif kind.detected:
            hollow.append(_without_knowledge(kind))
    parts = [f"{name} is better at {_listed(where)}" for name, where in better.items()] + hollow
    if not parts:
        parts = [_undecided(together)]
    elif not better:
        parts.append("so nothing here shows that either is better")
    text = "; ".join(parts)
    # A model's name keeps its own first letter.
    if not better:
        text = f"{text[0].upper()}{text[1:]}"
    return f"Which is better? {text}."


def _undecided(together: _Kind) -> str:
    if together.earned:
        return f"all items together favour {together.better.name}, though no kind alone does"
    return "these items do not tell the two apart"


def _without_knowledge(kind: _Kind) -> str:
    reason = "scores no better than a guess"
    if kind.better.always:
        reason = f"always says {kind.better.always!r}"
    elif kind.name == "choice by likelihood":
        reason = "is no better than after a greeting"
    text = f"in {kind.name} {kind.better.name} has more right, but {reason}"
    if 2 * kind.worse.unanswered >= kind.count:
        text += f", and {kind.worse.name} mostly gives no answer"
    return text


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
