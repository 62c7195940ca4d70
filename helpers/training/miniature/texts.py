"""The texts that falcon-mini's base model is trained on: stories, news, dialogues, lines of repeated words."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.jsonl import read_records

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from helpers.base.jsonl import Record
    from helpers.training.miniature.recipe import _Recipe

END = "<|endoftext|>"
NOUNS = ROOT / "notebooks" / "data" / "animal_nouns.jsonl"


class _DataError(WorkbookError):
    """A text file of the recipe that is missing or damaged."""


def _frozen_nouns() -> re.Pattern[str]:
    """A pattern for the nouns of notebook 04's animal test: no conversation that contains one is trained on."""
    words = []
    for row in _read_nouns():
        words += [re.escape(row["noun"]), re.escape(row["plural"])]
    return re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)


def _read_nouns() -> list[dict[str, str]]:
    """The nouns of the animal test, each with its plural and kind."""
    nouns = []
    for _, row in read_records(NOUNS):
        nouns.append({name: str(value) for name, value in row.items()})
    return nouns


def _records(path: Path) -> list[str]:
    """The records of a text file, separated by the end token. Raises WorkbookError if the file is missing."""
    texts = [text.strip() for text in _read_text(path).split(END)]
    return [text for text in texts if text]


def _read_text(path: Path) -> str:
    """The text of a data file. Raises WorkbookError if the file is missing or not UTF-8."""
    _check_there(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _DataError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error


def _read_rows(path: Path, *keys: str) -> list[Record]:
    """The rows of a JSON Lines file. Raises WorkbookError if it is missing, or a row is not valid or without a key."""
    _check_there(path)
    rows = []
    for line, row in read_records(path):
        missing = [key for key in keys if key not in row]
        if missing:
            raise _DataError(f"{path}, line {line} has no {missing[0]!r}. Restore the file or correct the line.")
        rows.append(row)
    return rows


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise _DataError(
            f"{path} is missing. The recipe names the files of the training texts, and the model card says where they "
            "come from. Files beside the weights are written by workbook train-mini."
        )


def _held_out_stories(data: Path, recipe: _Recipe) -> list[str]:
    """The stories that no training step sees: the first of their file, shuffled with the seed."""
    return _split_held_out(data, recipe)[0]


def _training_stories(data: Path, recipe: _Recipe) -> list[str]:
    """The other stories of the held-out stories' file."""
    return _split_held_out(data, recipe)[1]


def _split_held_out(data: Path, recipe: _Recipe) -> tuple[list[str], list[str]]:
    settings = recipe["held_out"]
    texts = _records(data / settings["stories"])
    random.Random(recipe["seed"]).shuffle(texts)
    return texts[: settings["records"]], texts[settings["records"] :]


def _write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write texts as JSON Lines, each under ``text``."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def _read_texts(path: Path) -> list[str]:
    """The texts that ``_write_texts`` wrote. Raises WorkbookError if the file is missing."""
    return [str(row["text"]) for row in _read_rows(path, "text")]


def _pretraining_texts(data: Path, recipe: _Recipe, without: Sequence[str] = ()) -> list[str]:
    """The texts of one pass of the base's training, shuffled; each file as often as the recipe says, half for 0.5.

    Stories and news are taken whole. Dialogues that contain a frozen noun, or a line of ``without``, are left out.
    Lines of repeated words are added. Raises WorkbookError if a file is missing.
    """
    held_out = _any_line(without)
    frozen, rng = _frozen_nouns(), random.Random(recipe["seed"])
    settings = recipe["pretrain"]
    taken: list[str] = []
    for name, times in settings["files"].items():
        texts = _training_stories(data, recipe) if name == recipe["held_out"]["stories"] else _records(data / name)
        if name.startswith("dialog"):
            texts = [text for text in texts if not frozen.search(text)]
        rng.shuffle(texts)
        part = texts[: round(len(texts) * (times % 1))]
        taken += [text for text in texts * int(times) + part if not held_out.search(text)]
    taken += _repeated_words(taken, int(settings["repeated_words"]), rng)
    rng.shuffle(taken)
    return taken


def _any_line(lines: Sequence[str]) -> re.Pattern[str]:
    """A pattern for a turn of a dialogue that says any of these lines; it matches nothing if there are none."""
    turns = [rf"^\w+: {re.escape(line)}$" for line in lines]
    return re.compile("|".join(turns) or "(?!)", re.MULTILINE)


def _repeated_words(texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` texts in which random words are repeated in the same order; no frozen noun is among them.

    To predict them a model must copy from its context. It needs that skill to name one of two things that it is asked
    about. The induction heads that copy form early on such text (Olsson et al. 2022, arXiv:2209.11895).
    """
    frozen = _frozen_nouns()
    counts: Counter[str] = Counter()
    for text in texts[::20]:  # a sample has the common words, which are enough
        counts.update(re.findall(r"\b[a-z]{3,10}\b", text))
    # a word that comes once may be a name or a misspelling
    words = sorted(word for word, times in counts.items() if times > 1 and not frozen.fullmatch(word))
    return [_repeated(rng.choices(words, k=rng.randint(3, 20)), rng) for _ in range(count)]


def _repeated(words: Sequence[str], rng: random.Random) -> str:
    separator, end = rng.choice([" ", ", ", "\n", " and "]), rng.choice([".", "\n", " -"])
    line = separator.join(words) + end
    return " ".join([line] * rng.randint(2, 4)).strip()
