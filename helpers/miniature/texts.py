"""What falcon-mini's base model is trained on: stories, news, dialogues, lines of repeated words."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.types import ROOT, WorkbookError

END = "<|endoftext|>"
NOUNS = ROOT / "notebooks" / "data" / "animal_nouns.jsonl"


class DataError(WorkbookError):
    """A text file of the recipe that is not there or cannot be read."""


def frozen_nouns() -> re.Pattern[str]:
    """Matches any noun of notebook 04's animal test: no conversation that holds one is trained on."""
    words = [re.escape(word) for row in read_nouns() for word in (row["noun"], row["plural"])]
    return re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)


def read_nouns() -> list[dict[str, str]]:
    """The nouns of the animal test, each with its plural and kind."""
    return [json.loads(line) for line in NOUNS.read_text(encoding="utf-8").splitlines()]


def records(path: Path) -> list[str]:
    """The records of a text file, separated by the end token. Raises DataError where there is no such file."""
    return [text.strip() for text in read_text(path).split(END) if text.strip()]


def read_text(path: Path) -> str:
    """The text of a data file. Raises DataError where there is no such file."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing. Of training texts the recipe names the files and the model card the origins; what "
            "stands beside the weights is made by workbook train-mini."
        )
    return path.read_text(encoding="utf-8")


def held_out_stories(data: Path, recipe: Mapping[str, Any]) -> list[str]:
    """The records that no training step sees: the first of their file in an order drawn with the seed."""
    return _split_held_out(data, recipe)[0]


def training_stories(data: Path, recipe: Mapping[str, Any]) -> list[str]:
    """The other records of the held-out stories' file."""
    return _split_held_out(data, recipe)[1]


def _split_held_out(data: Path, recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    settings = recipe["held_out"]
    texts = records(data / settings["stories"])
    random.Random(recipe["seed"]).shuffle(texts)
    return texts[: settings["records"]], texts[settings["records"] :]


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """The texts as JSON lines, each under ``text``."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read_texts(path: Path) -> list[str]:
    """The texts that ``write_texts`` wrote. Raises DataError where there is no such file."""
    return [json.loads(line)["text"] for line in read_text(path).splitlines()]


def pretraining_texts(data: Path, recipe: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    """What one pass of the base's training reads, shuffled: each file so often as the recipe says, half of it for 0.5.

    Stories and news are taken whole; dialogues without those that hold a frozen noun, or a line of ``without``. Lines
    of repeated words are added. Raises DataError for a missing file.
    """
    held_out = re.compile("|".join(rf"^\w+: {re.escape(line)}$" for line in without) or "(?!)", re.MULTILINE)
    frozen, rng = frozen_nouns(), random.Random(recipe["seed"])
    settings = recipe["pretrain"]
    found: list[str] = []
    for name, times in settings["files"].items():
        texts = training_stories(data, recipe) if name == recipe["held_out"]["stories"] else records(data / name)
        if name.startswith("dialog"):
            texts = [text for text in texts if not frozen.search(text)]
        rng.shuffle(texts)
        taken = texts * int(times) + texts[: round(len(texts) * (times % 1))]
        found += [text for text in taken if not held_out.search(text)]
    found += repeated_words(found, int(settings["repeated_words"]), rng)
    rng.shuffle(found)
    return found


def repeated_words(texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` texts in which random words come again in the same order, without the frozen nouns.

    To predict them a model must copy from its context, which it needs to name one of two things that it is asked about.
    The induction heads that do so form early on such text (Olsson et al. 2022, arXiv:2209.11895).
    """
    frozen = frozen_nouns()
    seen = Counter(word for text in texts[::20] for word in re.findall(r"\b[a-z]{3,10}\b", text))
    words = sorted(word for word, times in seen.items() if times > 1 and not frozen.fullmatch(word))
    return [_repeated(rng.choices(words, k=rng.randint(3, 20)), rng) for _ in range(count)]


def _repeated(words: Sequence[str], rng: random.Random) -> str:
    separator, end = rng.choice([" ", ", ", "\n", " and "]), rng.choice([".", "\n", " -"])
    line = separator.join(words) + end
    return " ".join([line] * rng.randint(2, 4)).strip()
