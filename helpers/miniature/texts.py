"""What falcon-mini is trained on: stories, news and dialogues to continue, replies to give."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.types import ROOT, WorkbookError

END = "<|endoftext|>"
NOUNS = ROOT / "notebooks" / "data" / "animal_nouns.jsonl"
ROLES = ("User", "Falcon")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one short sentence.", "You are a friendly falcon.")
SYSTEM_SHARE = 0.15
Turns = list[str]  # user, reply, user, reply, ...


class DataError(WorkbookError):
    """A text file of the recipe that is not there or cannot be read."""


def frozen_nouns() -> re.Pattern[str]:
    """Matches any noun of notebook 04's animal test: no conversation that holds one is trained on."""
    rows = [json.loads(line) for line in NOUNS.read_text(encoding="utf-8").splitlines()]
    words = [re.escape(word) for row in rows for word in (row["noun"], row["plural"])]
    return re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)


def records(path: Path) -> list[str]:
    """The records of a text file, separated by the end token. Raises DataError where there is no such file."""
    return [text.strip() for text in _read(path).split(END) if text.strip()]


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is missing: the recipe names the files, the model card where each comes from.")
    return path.read_text(encoding="utf-8")


def pretraining_texts(data: Path, recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): stories and news whole, dialogues without the frozen nouns.

    Of each file so many characters as the recipe says are taken, in an order drawn with its seed.
    """
    frozen, rng = frozen_nouns(), random.Random(recipe["seed"])
    settings = recipe["pretrain"]
    train: list[str] = []
    held_out: list[str] = []
    for name, most in settings["files"].items():
        texts = records(data / name)
        if name.startswith("dialog"):
            texts = [text for text in texts if not frozen.search(text)]
        rng.shuffle(texts)
        if name == settings["held_out_file"]:
            held_out, texts = texts[: settings["held_out_records"]], texts[settings["held_out_records"] :]
        sizes = itertools.accumulate(map(len, texts))
        train += [text for text, size in zip(texts, sizes, strict=True) if size <= most]
    rng.shuffle(train)
    return train, held_out


def conversations(path: Path) -> Iterator[Turns]:
    """User and reply turns of a dialogue (.txt) or instruction (.jsonl) file.

    Talks in which the speakers do not alternate are left out. Raises DataError where there is no such file.
    """
    if path.suffix == ".jsonl":
        for line in _read(path).splitlines():
            row = json.loads(line)
            question = " ".join(part for part in (row.get("context"), row["prompt"]) if part)
            yield [*(row.get("turns") or [question]), row["response"]]
        return
    for record in records(path):
        lines = [line.split(": ", 1) for line in record.splitlines()]
        alternate = all(a[0] != b[0] for a, b in itertools.pairwise(lines))
        if alternate and len(lines) > 1 and all(len(line) == 2 for line in lines):
            yield [" ".join(line[1].split()) for line in lines]


def chat_examples(data: Path, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prompt, reply) pairs in the Falcon chat format, one reply of each conversation, frozen nouns left out.

    The reply begins with its space and ends with the end token.
    """
    frozen, rng = frozen_nouns(), random.Random(recipe["seed"])
    settings, pairs = recipe["chat"], []
    for name, most in settings["files"].items():
        found = [turns for turns in conversations(data / name) if not frozen.search(" ".join(turns))]
        rng.shuffle(found)
        for turns in found[:most]:
            last = rng.randrange(1, len(turns), 2)
            reply = " ".join(turns[last].split())
            if not reply or len(reply) > settings["reply_max_characters"]:
                continue
            lines = [f"{ROLES[place % 2]}: {' '.join(turn.split())}" for place, turn in enumerate(turns[:last])]
            if rng.random() < SYSTEM_SHARE:
                lines.insert(0, f"System: {rng.choice(SYSTEM_PROMPTS)}")
            pairs.append(("\n".join([*lines, "Falcon:"]), f" {reply}{END}"))
    rng.shuffle(pairs)
    return pairs[: settings["max_examples"]]
