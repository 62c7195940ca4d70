"""Ask several models the same prompts and score their replies by rules: shares, intervals, the paired difference.

``compare`` returns a ``Comparison``, which holds the replies and computes everything else from them. Items with an
answer key are scored by ``RULES``; prompts without a key are only shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError, check_whole, choose
from helpers.base.stats import Interval
from helpers.evaluation.answers import _CLASSES, RULES, AnswerClass, _guessing_level, _is_scored, classify
from helpers.evaluation.data import Item, _check_questions
from helpers.generation.generating import generate_batch
from helpers.generation.sampling import Reply, Sampling
from helpers.models.formats import Message
from helpers.models.loaded import Loaded
from helpers.models.references import ModelRef

if TYPE_CHECKING:
    from pandas import DataFrame

    from helpers.models.references import Profile

GREEDY = Sampling(temperature=0, max_new_tokens=24)
Side = Loaded | ModelRef
_MOST_PADDED = 5  # times the length of the shortest prompt of a batch; its format adds to both
_ROLES = ("falcon", "llama")  # the keys of ``sides``: a reader sees the model's own name instead


@dataclass(frozen=True)
class _Difference:
    """First side minus second side over the same items.

    p_value: of the exact McNemar test; only_first, only_second: how many items only this side got right.
    """

    first: str
    second: str
    interval: Interval
    p_value: float
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Comparison:
    """The replies of each side to the same items, in their order.

    ``labels`` has the full name of each side's model, which says if it is a stand-in, and ``models`` its short one.
    Code asks by the side's key ("falcon", "before"); tables and figures call it as ``names`` does.
    """

    items: tuple[Item, ...]
    replies: Mapping[str, tuple[Reply, ...]]
    labels: Mapping[str, str]
    stored_bytes: Mapping[str, int]
    models: Mapping[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the sides, in the order given."""
        return tuple(self.replies)

    @property
    def names(self) -> dict[str, str]:
        """What a reader sees for each side, by key: the model's own name, and the key where names alone are equal."""
        return self.names_of({side: self.models.get(side, self.labels[side]) for side in self.sides})

    @staticmethod
    def names_of(models: Mapping[str, str]) -> dict[str, str]:
        """What a reader sees for each side, from the models' names by side: the name, and the key if names are equal.

        Sides of one and the same model ("before", "after") are told apart by their keys alone.
        """
        shown = {}
        only_keys = len(set(models.values())) == 1 and not set(models) & set(_ROLES)
        for side, model in models.items():
            others = [other for other, name in models.items() if name == model and other != side]
            # Of two sides of one model, the one that only has its role stands for the model itself.
            if not others or (side in _ROLES and not set(others) & set(_ROLES)):
                shown[side] = model
            elif only_keys:
                shown[side] = side
            else:
                shown[side] = f"{model}, {side}"
        return shown

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the items that have a key, in their order."""
        return tuple(dict.fromkeys(item.kind for item in self.items if _is_scored(item)))

    def table(self) -> DataFrame:
        """The replies side by side: one row per item."""
        import pandas as pd

        columns = {"question": [item.question for item in self.items]}
        for side, name in self.names.items():
            columns[name] = [reply.text.strip() for reply in self.replies[side]]
        return pd.DataFrame(columns).rename_axis("item")

    def verdicts(self, side: str, rule: str = "correct", kind: str | None = None) -> tuple[bool, ...]:
        """What a rule ("correct", "concise") says of one side's replies to the items with a key, of one kind or all.

        Raises WorkbookError for an unknown side or rule, or if no item has a key.
        """
        passes = RULES[choose(rule, RULES, "rule")]
        return tuple(passes(item, reply) for item, reply in self._scored(side, kind))

    def classes(self, side: str, kind: str | None = None) -> tuple[AnswerClass, ...]:
        """Right, wrong or no answer: the class of each reply that ``verdicts`` judges. Raises as ``verdicts`` does."""
        return tuple(classify(item, reply.text) for item, reply in self._scored(side, kind))

    def guessing(self, kind: str | None = None) -> float:
        """The share of these items that a guess gets right on average. Raises as ``verdicts`` does."""
        return fmean(_guessing_level(item) for item, _ in self._scored(self.sides[0], kind))

    def _scored(self, side: str, kind: str | None = None) -> list[tuple[Item, Reply]]:
        """The items with a key, of one kind or all, each with one side's reply."""
        choose(side, self.replies, "side")
        pairs = []
        for item, reply in zip(self.items, self.replies[side], strict=True):
            # Items without a key are asked and shown, but no rule can judge them.
            if _is_scored(item) and kind in (None, item.kind):
                pairs.append((item, reply))
        if not pairs:
            of_kind = f" of kind {kind!r}" if kind else ""
            raise WorkbookError(
                f"No item{of_kind} has an answer to score by. Ask an "
                "Item(id, kind, question, answer=('goat',), others=('saddle',))."
            )
        return pairs

    def score(self, side: str, rule: str = "correct", kind: str | None = None) -> Interval:
        """The share of items that one side's replies pass, with its 95% Wilson interval."""
        verdicts = self.verdicts(side, rule, kind)
        return stats.proportion(sum(verdicts), len(verdicts))

    def scores(self) -> DataFrame:
        """Shares with 95% intervals by kind, side and rule, in the order of the items; "all" if kinds differ.

        For correct replies, ``guessing`` is what a guess would score. Raises WorkbookError if no item has an answer.
        """
        import pandas as pd

        rows = []
        for kind, (side, name), rule in itertools.product(self._groups(), self.names.items(), RULES):
            verdicts, share = self.verdicts(side, rule, kind), self.score(side, rule, kind)
            row = {"items": kind or "all", "side": name, "rule": rule, "passed": sum(verdicts), "of": len(verdicts)}
            row |= {"share": share.estimate, "low": share.low, "high": share.high}
            rows.append(row | {"guessing": self.guessing(kind) if rule == "correct" else None})
        return pd.DataFrame(rows)

    def answers(self) -> DataFrame:
        """How many replies are right, wrong and no answer, by kind and side, beside what a guess would score.

        ``share``, ``low`` and ``high``: the right ones with their 95% interval. Raises as ``scores`` does.
        """
        import pandas as pd

        rows = []
        for kind, (side, name) in itertools.product(self._groups(), self.names.items()):
            classes, share = self.classes(side, kind), self.score(side, kind=kind)
            row = {"items": kind or "all", "side": name, "of": len(classes)}
            for answer in _CLASSES:
                row[answer] = classes.count(answer)
            rows.append(row | {"share": share.estimate, "low": share.low, "high": share.high})
            rows[-1]["guessing"] = self.guessing(kind)
        return pd.DataFrame(rows)

    def differences(self, first: str, second: str) -> DataFrame:
        """``difference`` by kind, and for all items if kinds differ: first minus second, with McNemar's exact p."""
        import pandas as pd

        rows = []
        for kind in self._groups():
            found = self.difference(first, second, kind=kind)
            row = {"items": kind or "all", "difference": found.interval.estimate}
            row |= {"low": found.interval.low, "high": found.interval.high, "p": found.p_value}
            row |= {f"only {self.names[first]}": found.only_first, f"only {self.names[second]}": found.only_second}
            rows.append(row)
        return pd.DataFrame(rows)

    def _groups(self) -> list[str | None]:
        """The kinds of the scored items, and None for all of them."""
        # With a single kind, a row over all items would only repeat it.
        if len(self.kinds) == 1:
            return list(self.kinds)
        return [*self.kinds, None]

    def difference(self, first: str, second: str, rule: str = "correct", kind: str | None = None) -> _Difference:
        """First minus second over the same items, with its 95% interval and the exact McNemar test.

        Raises WorkbookError as ``verdicts`` does, and for fewer than two items.
        """
        left, right = self.verdicts(first, rule, kind), self.verdicts(second, rule, kind)
        _check_several(left)
        only_first, only_second = stats.discordant_pairs(left, right)
        interval = stats.paired_difference(left, right)
        return _Difference(first, second, interval, stats.mcnemar(left, right), only_first, only_second)

    def win_rate(self, first: str | None = None, second: str | None = None, kind: str | None = None) -> Interval:
        """How often the first side's reply is the better one, with its 95% interval; a tie counts half.

        A correct reply is better than a wrong one, and of two correct replies a concise one; two wrong ones tie. By
        default the sides are the first two. Raises WorkbookError for a single side, or for fewer than two items.
        """
        if len(self.sides) < 2:
            raise WorkbookError(f"A win rate needs two sides, but there is only {', '.join(self.sides)}.")
        grades = self._grades(first or self.sides[0], kind)
        _check_several(grades)
        points = []
        for grade, other in zip(grades, self._grades(second or self.sides[1], kind), strict=True):
            if grade == other:
                points.append(0.5)
            elif grade > other:
                points.append(1.0)
            else:
                points.append(0.0)
        if 0.5 not in points:
            return stats.proportion(round(sum(points)), len(points))
        rate = stats.mean(points)
        if len(set(points)) == 1:
            # All tied: a side may win as many of the next as no difference at all leaves possible.
            none = stats.paired_difference([0] * len(points), [0] * len(points))
            return replace(rate, low=0.5 + none.low / 2, high=0.5 + none.high / 2)
        # Student's t knows no bounds, but a rate has them.
        return replace(rate, low=max(rate.low, 0.0), high=min(rate.high, 1.0))

    def _grades(self, side: str, kind: str | None) -> list[int]:
        """0 for a wrong reply, 1 for a correct one, 2 for one that is concise too."""
        grades = []
        for correct, concise in zip(*(self.verdicts(side, rule, kind) for rule in ("correct", "concise")), strict=True):
            # Only a correct reply can be concise, so the number of rules passed is the grade.
            grades.append([correct, concise].count(True))
        return grades

    def speed(self) -> DataFrame:
        """Medians over the replies: seconds to the first token, tokens and characters per second after it.

        The index has the models' names. Tokenizers differ, so only characters per second compare two models. The times
        are meaningful only for replies generated one at a time (``batch_size=1``).
        """
        import pandas as pd

        rows = {}
        for side, replies in self.replies.items():
            # A reply of one token has no time after its first token.
            timed = [reply for reply in replies if reply.tokens > 1]
            rows[self.names[side]] = {
                "first token (s)": median(reply.first_token_seconds for reply in replies),
                "tokens/s": median([reply.tokens_per_second for reply in timed] or [math.nan]),
                "characters/s": median([reply.characters_per_second for reply in timed] or [math.nan]),
                "words per reply": median(len(reply.text.split()) for reply in replies),
                "weights (MiB)": self.stored_bytes[side] / 2**20,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")

    def beside(self, other: Comparison) -> Comparison:
        """Both comparisons as one, for example of a model before and after training.

        Raises ValueError if the items differ, or if a side of the same name is in both.
        """
        if self.items != other.items:
            raise ValueError("The two comparisons are over different items.")
        both = set(self.sides) & set(other.sides)
        if both:
            raise ValueError(f"Both comparisons have a side called {', '.join(both)}.")
        return Comparison(
            self.items,
            {**self.replies, **other.replies},
            {**self.labels, **other.labels},
            {**self.stored_bytes, **other.stored_bytes},
            {**self.models, **other.models},
        )

    def rescored(self, items: Sequence[Item]) -> Comparison:
        """The same replies under another answer key. Raises ValueError if the number of items differs."""
        if len(items) != len(self.items):
            raise ValueError(f"There are {len(self.items)} items, but {len(items)} keys.")
        return replace(self, items=tuple(items))


def _check_several(verdicts: Sequence[object]) -> None:
    if len(verdicts) < 2:
        raise WorkbookError("An interval needs at least two items with an answer.")


def compare(
    prompts: Sequence[str | Item],
    models: Mapping[str, Side],
    sampling: Sampling = GREEDY,
    *,
    precision: str = "bf16",
    batch_size: int = 1,
    system: str | None = None,
) -> Comparison:
    """Ask every model every prompt, each in its own chat format.

    ``system`` is a system message for every model. None leaves each format its own, which only some have; an empty
    text takes that away.
    A model given as ModelRef is loaded in ``precision`` for its turn only, so that models that do not fit together
    can be compared. ``batch_size`` prompts are generated at once: more is faster, but times then describe the batch.
    Raises WorkbookError for no prompts, a blank one, two items with one id, no models or no batch, before any model is
    loaded, and what ``generation.generate`` raises.
    """
    _check_asked(prompts, models)
    check_whole("batch_size", batch_size)
    items = tuple(_item(prompt, number) for number, prompt in enumerate(prompts, 1))
    _check_questions(items)
    before: list[Message] = [] if system is None else [Message(role="system", content=system)]
    replies, labels, sizes, names = {}, {}, {}, {}
    for side, model in models.items():
        with opened(model, precision) as loaded:
            asked = [[*before, Message(role="user", content=item.question)] for item in items]
            replies[side] = tuple(_replies(loaded, asked, sampling, batch_size))
            labels[side], names[side], sizes[side] = loaded.ref.label, loaded.ref.name, loaded.report.stored_bytes
    return Comparison(items, replies, labels, sizes, names)


def _check_asked(prompts: Sequence[str | Item], models: Mapping[str, Side]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise WorkbookError("Give a list of prompts, not a single text and not an empty list.")
    named = isinstance(models, Mapping) and models
    if not named or not all(isinstance(model, Loaded | ModelRef) for model in models.values()):
        raise WorkbookError('Give the models by name, loaded or as entries of a profile: {"falcon": loaded, ...}.')


def _item(prompt: str | Item, number: int) -> Item:
    if isinstance(prompt, Item):
        return prompt
    try:
        return Item(f"prompt-{number}", "prompt", prompt)
    except ValueError as error:
        raise WorkbookError(f"Prompt {number} cannot be asked: {error}. Correct it or leave it out.") from error


def sides(profile: Profile) -> dict[str, Side]:
    """The chat models of a profile as ``compare`` takes them: loaded if both fit, else to be loaded in turn."""
    from helpers.models import loading

    refs = {"falcon": profile.falcon_chat, "llama": profile.llama_chat}
    if any({"falcon_chat", "llama_chat"} <= set(group) for group in profile.resident):
        return {side: loading.load(ref, profile.precision) for side, ref in refs.items()}
    return dict(refs)


@contextmanager
def opened(model: Side, precision: str) -> Iterator[Loaded]:
    """The model, loaded: as it is if it was loaded before, else for the length of the block."""
    from helpers.models import loading

    if isinstance(model, Loaded):
        yield model
        return
    loaded = loading.load(model, precision)
    try:
        yield loaded
    finally:
        loading.unload(loaded)


def _replies(loaded: Loaded, asked: Sequence[Sequence[Message]], sampling: Sampling, batch_size: int) -> list[Reply]:
    from transformers.utils.logging import tqdm

    replies: dict[int, Reply] = {}
    with tqdm(total=len(asked), desc=f"replies of {loaded.ref.name}", unit="reply", delay=2, leave=False) as bar:
        for batch in _batches(asked, batch_size):
            generated = generate_batch(loaded, [asked[number] for number in batch], sampling)
            replies.update(zip(batch, generated, strict=True))
            bar.update(len(batch))
    return [replies[number] for number in range(len(asked))]


def _batches(asked: Sequence[Sequence[Message]], batch_size: int) -> list[list[int]]:
    """The numbers of the prompts that are generated together: of similar length, for all are padded to the longest."""
    lengths = []
    for messages in asked:
        lengths.append(sum(len(message["content"]) for message in messages))
    batches: list[list[int]] = []
    for number in sorted(range(len(asked)), key=lengths.__getitem__):
        if batches and len(batches[-1]) < batch_size and lengths[number] <= _MOST_PADDED * lengths[batches[-1][0]]:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
