"""What models are asked and scored on: items with their answer keys, and texts, read from JSON Lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, first_names
from helpers.base.jsonl import scan_records
from helpers.base.text import is_blank, well_formed
from helpers.evaluation.rules import _follows, _Rule, _rules, names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from helpers.base.jsonl import Record


_KEYS = frozenset({"id", "kind", "question", "answer", "others", "rules", "source", "difficulty"})
_DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Item:
    """A question with its key: what a correct reply names, what it must not name, and the rules that it must follow.

    Without an answer and rules it is not scored. ``source``: who wrote it. ``difficulty``: easy, medium or hard.
    Raises ValueError for a key that is not a list of words, for a word that is in both, and for what is not a text.
    """

    id: str
    kind: str
    question: str
    answer: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    rules: tuple[_Rule, ...] = ()
    source: str = ""
    difficulty: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "kind", "question"):
            _check_text(name, getattr(self, name))
        for name in ("answer", "others"):
            _check_words(name, getattr(self, name))
        everything = " and ".join(self.answer)
        if wrong := [word for word in self.others if names(everything, word)]:
            raise ValueError(f"No reply can be right: {first_names(wrong)} is in both answer and others")
        if self.difficulty and self.difficulty not in _DIFFICULTIES:
            raise ValueError(f"difficulty must be {', '.join(_DIFFICULTIES)}, but is {self.difficulty!r}")

    @property
    def scored(self) -> bool:
        """Whether it has a key: an answer or rules."""
        return bool(self.answer or self.rules)

    def follows_rules(self, text: str) -> bool:
        """Whether a reply follows all of the item's rules; true if there are none."""
        return _follows(self.rules, text)


def read_items(path: Path, *, sourced: bool = False) -> list[Item]:
    """The items of a JSON Lines file; ``sourced``: each must say who wrote it, and how difficult it is.

    Raises WorkbookError, which lists the lines with the reasons, if some row is not a valid item, or if two rows have
    one id.
    """
    records = scan_records(path)
    items: list[Item] = []
    first_line: dict[str, int] = {}
    for line, row, record in records.valid:
        try:
            item = _item(record)
            if sourced:
                _check_text("source", record.get("source"))
                _check_text("difficulty", record.get("difficulty"))
            if item.id in first_line:
                raise ValueError(f"line {first_line[item.id]} has the id {item.id!r} already")
        except ValueError as error:
            records.reject(line, row, f"{error}.")
            continue
        first_line[item.id] = line
        items.append(item)
    records.refuse_bad("items")
    return items


def read_texts(path: Path) -> list[str]:
    """The texts of a JSON Lines file whose rows hold a ``text`` each; other keys are ignored.

    Raises WorkbookError, which lists the lines with the reasons, if some row holds no text.
    """
    records = scan_records(path)
    texts = []
    for line, row, record in records.valid:
        try:
            _check_text("text", record.get("text"))
        except ValueError as error:
            records.reject(line, row, f"{error}.")
        else:
            texts.append(str(record["text"]))
    records.refuse_bad("texts")
    return texts


def _check_questions(items: Sequence[Item]) -> None:
    """Raise WorkbookError if two of the items that are to be asked have the same id."""
    counts = Counter(item.id for item in items)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise WorkbookError(f"Several items have the same id: {first_names(twice)}. Give each item an id of its own.")


def _item(record: Record) -> Item:
    unknown = record.keys() - _KEYS
    if unknown:
        raise ValueError(f"An item has no key {first_names(map(repr, unknown))}")
    words = {name: record.get(name, ()) for name in ("answer", "others")}
    # Item itself refuses a key that is a text, which a tuple would take apart into letters.
    for name, value in words.items():
        words[name] = tuple(value) if isinstance(value, list) else value
    # A field that is missing is refused as one of another type is.
    texts = {name: record.get(name) for name in ("id", "kind", "question")}
    if type(texts["id"]) is int:
        texts["id"] = str(texts["id"])
    about = {name: record[name] for name in ("source", "difficulty") if name in record}
    for name, value in about.items():
        _check_text(name, value)
    rules = _rules(record.get("rules", {}))
    return Item(**texts, **words, **about, rules=rules)  # type: ignore[arg-type]  # Item checks the types


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, but is {_kind(value)}")
    if is_blank(value):
        raise ValueError(f"{name} is blank")
    if not well_formed(value):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character")


def _check_words(name: str, words: object) -> None:
    if not isinstance(words, tuple | list):
        raise ValueError(f"{name} must be a list of words, but is {_kind(words)}")
    for word in words:
        try:
            _check_text("a word", word)
        except ValueError as error:
            raise ValueError(f"{name} is not a list of words: {error}") from error
        # It would be found only with the same space around it.
        if word != word.strip():
            raise ValueError(f"{name} has spaces around the word {word!r}")


def _kind(value: object) -> str:
    """The type of a value in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "a mapping", list: "a list", str: "a text", type(None): "missing or null"}
    return names.get(type(value), type(value).__name__)
