"""The same prompts to two models: replies, scores by rule, intervals, the paired difference and its test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from helpers import stats
from helpers.generation import generate_batch
from helpers.types import Interval, Loaded, ModelRef, Profile, Reply, Sampling, WorkbookError, choose

if TYPE_CHECKING:
    from pandas import DataFrame

CONCISE_WORDS = 12
GREEDY = Sampling(temperature=0, max_new_tokens=24)
Side = Loaded | ModelRef


@dataclass(frozen=True)
class Item:
    """A question with its key: what a right reply names, and what it must not. Without an answer it is not scored.

    Raises ValueError for a key that is one text instead of several words.
    """

    id: str
    kind: str
    question: str
    answer: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for words in (self.answer, self.others):
            if isinstance(words, str) or not all(isinstance(word, str) and word for word in words):
                raise ValueError(f"{words!r} is no list of words")


@dataclass(frozen=True)
class Difference:
    """First side minus second side over the same items.

    p_value: of the exact McNemar test; only_first, only_second: the items that one side alone got right.
    """

    first: str
    second: str
    interval: Interval
    p_value: float
    only_first: int
    only_second: int


def read_items(path: Path) -> list[Item]:
    """The items of a JSON-lines file. Raises WorkbookError, naming the line, for one that is no item."""
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            keys = {name: row.pop(name, []) for name in ("answer", "others")}
            item = Item(**row, **keys)
            items.append(replace(item, answer=tuple(item.answer), others=tuple(item.others)))
        except (ValueError, TypeError, AttributeError) as error:
            raise WorkbookError(f"{path.name}, line {number} is no item: {error}") from error
    return items


def names(text: str, word: str) -> bool:
    """True when the text holds the word, in singular or plural, in any case."""
    return re.search(rf"\b{re.escape(word)}(e?s)?\b", text, re.IGNORECASE) is not None


def is_correct(item: Item, text: str) -> bool:
    """The rule of correctness: every word of the answer is named, and none of the others."""
    missing = [word for word in item.answer if not names(text, word)]
    wrong = [word for word in item.others if names(text, word)]
    return not missing and not wrong


def is_concise(reply: Reply) -> bool:
    """The rule of conciseness: it ended by itself, with at least one word and at most CONCISE_WORDS."""
    return reply.finish_reason != "length" and 1 <= len(reply.text.split()) <= CONCISE_WORDS


RULES: dict[str, Callable[[Item, Reply], bool]] = {
    "correct": lambda item, reply: is_correct(item, reply.text),
    "concise": lambda item, reply: is_concise(reply),
}


@dataclass(frozen=True)
class Comparison:
    """The replies of each side to the same items, in their order. ``labels``: each side's model, named in full."""

    items: tuple[Item, ...]
    replies: Mapping[str, tuple[Reply, ...]]
    labels: Mapping[str, str]
    stored_bytes: Mapping[str, int]

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the sides, in the order given."""
        return tuple(self.replies)

    def table(self) -> DataFrame:
        """The replies side by side: one row an item."""
        import pandas as pd

        texts = {side: [reply.text.strip() for reply in replies] for side, replies in self.replies.items()}
        return pd.DataFrame({"question": [item.question for item in self.items], **texts}).rename_axis("item")

    def verdicts(self, side: str, rule: str = "correct", kind: str | None = None) -> tuple[bool, ...]:
        """What a rule ("correct", "concise") says of one side's replies to the items with a key, of one kind or all.

        Raises WorkbookError for an unknown side or rule, or where no item has a key.
        """
        choose(side, self.replies, "side")
        choose(rule, RULES, "rule")
        pairs = zip(self.items, self.replies[side], strict=True)
        scored = [(i, reply) for i, reply in pairs if i.answer and kind in (None, i.kind)]
        if not scored:
            raise WorkbookError(
                f"No item{f' of kind {kind!r}' if kind else ''} has an answer to score by: ask an "
                "Item(id, kind, question, answer=('goat',), others=('saddle',))."
            )
        return tuple(RULES[rule](item, reply) for item, reply in scored)

    def score(self, side: str, rule: str = "correct", kind: str | None = None) -> Interval:
        """The share of items that one side's replies pass, with its 95% Wilson interval."""
        verdicts = self.verdicts(side, rule, kind)
        return stats.proportion(sum(verdicts), len(verdicts))

    def scores(self) -> DataFrame:
        """Shares with 95% intervals by side, kind and rule, in the order of the items; "all" where kinds differ.

        Raises WorkbookError where no item has an answer.
        """
        import pandas as pd

        kinds: list[str | None] = list(dict.fromkeys(item.kind for item in self.items if item.answer)) or [None]
        rows = []
        for kind in [*kinds, None] if len(kinds) > 1 else kinds:
            for side in self.sides:
                for rule in RULES:
                    verdicts, share = self.verdicts(side, rule, kind), self.score(side, rule, kind)
                    row = {"items": kind or "all", "side": side, "rule": rule, "passed": sum(verdicts)}
                    rows.append(
                        row | {"of": len(verdicts), "share": share.estimate, "low": share.low, "high": share.high}
                    )
        return pd.DataFrame(rows)

    def difference(self, first: str, second: str, rule: str = "correct", kind: str | None = None) -> Difference:
        """First minus second over the same items, with its 95% interval and the exact McNemar test.

        Raises WorkbookError as ``verdicts`` does, and for fewer than two items.
        """
        one, two = self.verdicts(first, rule, kind), self.verdicts(second, rule, kind)
        _check_several(one)
        alone = [sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((one, two), (two, one))]
        interval = _within(stats.paired_difference(one, two), -1, 1)
        return Difference(first, second, interval, stats.mcnemar(one, two), *alone)

    def win_rate(self, first: str | None = None, second: str | None = None) -> Interval:
        """How often the first side's reply is the better one, with its 95% interval; a tie counts half.

        A correct reply is better than a wrong one, and of two correct ones a concise one; two wrong ones tie. The sides
        are the first two unless named. Raises WorkbookError where there is one side alone, or fewer than two items.
        """
        if len(self.sides) < 2:
            raise WorkbookError(f"A win rate needs two sides, but there is only {', '.join(self.sides)}.")
        chosen = (first or self.sides[0], second or self.sides[1])
        verdicts = [zip(*(self.verdicts(side, rule) for rule in RULES), strict=True) for side in chosen]
        grades = [[correct + (correct and concise) for correct, concise in side] for side in verdicts]
        _check_several(grades[0])
        return _within(stats.mean([(a > b) + (a == b) / 2 for a, b in zip(*grades, strict=True)]), 0, 1)

    def speed(self) -> DataFrame:
        """Medians over the replies: seconds to the first token, tokens per second after it; and bytes of the weights.

        The times mean something for replies generated one at a time (``batch_size=1``).
        """
        import pandas as pd

        rows = {
            side: {
                "model": self.labels[side],
                "first token (s)": median(reply.first_token_seconds for reply in replies),
                "tokens/s": median([r.tokens_per_second for r in replies if r.tokens > 1] or [float("nan")]),
                "words a reply": median(len(reply.text.split()) for reply in replies),
                "weights (MiB)": self.stored_bytes[side] / 2**20,
            }
            for side, replies in self.replies.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("side")

    def beside(self, other: Comparison) -> Comparison:
        """Both comparisons as one, as of a model before and after.

        Raises ValueError where the items differ, or a side of the same name is in both.
        """
        if self.items != other.items:
            raise ValueError("the two comparisons are over different items")
        if both := set(self.sides) & set(other.sides):
            raise ValueError(f"both comparisons have a side called {', '.join(both)}")
        parts = ("replies", "labels", "stored_bytes")
        return replace(self, **{part: {**getattr(self, part), **getattr(other, part)} for part in parts})

    def rescored(self, items: Sequence[Item]) -> Comparison:
        """The same replies under another answer key. Raises ValueError where the number of items differs."""
        if len(items) != len(self.items):
            raise ValueError(f"there are {len(self.items)} items, but {len(items)} keys")
        return replace(self, items=tuple(items))


def _within(interval: Interval, least: float, most: float) -> Interval:
    """The part of an interval that is possible: Student's t knows no bounds."""
    return replace(interval, low=max(interval.low, least), high=min(interval.high, most))


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
) -> Comparison:
    """Asks every model every prompt, each in its own chat format.

    A model given as ModelRef is loaded in ``precision`` for its turn only, so that models that do not fit together
    can be compared. ``batch_size`` prompts are generated at once: more is faster, but times then describe the batch.
    Raises WorkbookError for no prompts, no models or no batch, and what ``generation.generate`` raises.
    """
    if isinstance(prompts, str) or not prompts:
        raise WorkbookError("Give a list of prompts, not one text and not none.")
    named = isinstance(models, Mapping) and models
    if not named or not all(isinstance(model, Loaded | ModelRef) for model in models.values()):
        raise WorkbookError('Give the models by name, loaded or as entries of a profile: {"falcon": loaded, ...}.')
    if batch_size < 1:
        raise WorkbookError(f"batch_size must be at least 1, but is {batch_size}.")
    items = tuple(p if isinstance(p, Item) else Item(f"prompt-{n}", "prompt", p) for n, p in enumerate(prompts, 1))
    replies, labels, sizes = {}, {}, {}
    for side, model in models.items():
        with opened(model, precision) as loaded:
            replies[side] = tuple(_replies(loaded, items, sampling, batch_size, side))
            labels[side], sizes[side] = loaded.ref.label, loaded.report.stored_bytes
    return Comparison(items, replies, labels, sizes)


def sides(profile: Profile) -> dict[str, Side]:
    """The chat models of a profile as ``compare`` takes them: loaded where both fit, else to be loaded in turn."""
    from helpers import loading

    refs = {"falcon": profile.falcon_chat, "llama": profile.llama_chat}
    if any({"falcon_chat", "llama_chat"} <= set(group) for group in profile.resident):
        return {side: loading.load(ref, profile.precision) for side, ref in refs.items()}
    return dict(refs)


@contextmanager
def opened(model: Side, precision: str) -> Iterator[Loaded]:
    """A model that is loaded: as it is, or for the length of the block."""
    from helpers import loading

    if isinstance(model, Loaded):
        yield model
        return
    loaded = loading.load(model, precision)
    try:
        yield loaded
    finally:
        loading.unload(loaded)


def _replies(loaded: Loaded, items: Sequence[Item], sampling: Sampling, batch_size: int, side: str) -> Iterator[Reply]:
    from transformers.utils.logging import tqdm

    with tqdm(total=len(items), desc=f"replies of {side}", unit="reply", delay=2, leave=False) as bar:
        for begin in range(0, len(items), batch_size):
            batch = items[begin : begin + batch_size]
            messages = [[{"role": "user", "content": item.question}] for item in batch]
            yield from generate_batch(loaded, messages, sampling)
            bar.update(len(batch))
