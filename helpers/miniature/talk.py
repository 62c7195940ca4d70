"""What falcon-mini-chat is tuned on: replies of public conversations, short stories on request, simple facts."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.miniature.texts import END, frozen_nouns, read_text, records, training_stories
from helpers.types import ROOT

FACTS = ROOT / "env" / "models" / "falcon-mini" / "facts.yaml"
ROLES = ("User", "Falcon")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly falcon.")
SHORT_PROMPT = "Answer in one short sentence."  # only where the reply is one
SYSTEM_SHARE = 0.15
ANIMAL_SHARE = 0.7  # of the choices
HISTORY = 5  # turns before a reply that it is trained with, an odd number: the first is the user's
CHOICES = ("Which is {kind}, {first} or {second}?", "Which one is {kind}: {first} or {second}?")
WHAT = ("What is {thing}?", "What kind of thing is {thing}?")
LISTS = ("Name three {kinds}.", "Please name three {kinds}.", "Can you name three {kinds}?")
REPEATS = ("Repeat the word {word}.", "Say the word {word}.", "Please say {word}.")
REQUESTS = ("Tell me a story.", "Can you tell me a short story?", "Please tell me a little story.", "I want a story.")
REQUESTS_ABOUT = ("Tell me a story about {thing}.", "Can you tell me a short story about {thing}?")
Turns = list[str]  # user, reply, user, reply, ...
Facts = Mapping[str, Any]


def read_facts(path: Path = FACTS) -> Facts:
    """The facts file: kinds, pairs and small talk."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def conversations(path: Path) -> Iterator[Turns]:
    """User and reply turns of a dialogue (.txt) or instruction (.jsonl) file.

    Talks in which the speakers do not alternate are left out. Raises DataError where there is no such file.
    """
    if path.suffix == ".jsonl":
        for line in read_text(path).splitlines():
            row = json.loads(line)
            question = " ".join(part for part in (row.get("context"), row["prompt"]) if part)
            yield [*(row.get("turns") or [question]), row["response"]]
        return
    for record in records(path):
        lines = [line.split(": ", 1) for line in record.splitlines()]
        alternate = all(a[0] != b[0] for a, b in itertools.pairwise(lines))
        if alternate and len(lines) > 1 and all(len(line) == 2 for line in lines):
            yield [" ".join(line[1].split()) for line in lines]


def held_out_talks(data: Path, recipe: Mapping[str, Any]) -> list[Turns]:
    """(user message, reply) that begin the conversations held out, so many of each file as the recipe says."""
    return [
        [" ".join(turn.split()) for turn in turns[:2]]
        for name, settings in recipe["chat"]["files"].items()
        for turns in _split(data / name, settings["held_out"], recipe)[0]
    ]


def chat_examples(data: Path, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prompt, reply) pairs in the Falcon chat format, shuffled; no text with a frozen noun, none held out.

    The reply begins with its space and ends with the end token. Raises DataError for a missing file.
    """
    rng, settings = random.Random(recipe["seed"]), recipe["chat"]
    held_out = {_plain(message) for message, _ in held_out_talks(data, recipe)}
    most = settings["reply_max_characters"]
    found = [
        turns
        for turns in _talks(data, recipe, rng)
        if 0 < len(turns[-1]) <= most and held_out.isdisjoint(map(_plain, turns[::2]))
    ]
    talks = [*found, *_stories(data, recipe, rng), *fact_talks(settings["kinds"], settings["facts"], rng)]
    pairs = [pair(turns, rng) for turns in talks]
    rng.shuffle(pairs)
    return pairs


def chat_pairs(talks: Sequence[Turns]) -> list[tuple[str, str]]:
    """(prompt, reply) pairs of talks that end with the reply, without a system prompt."""
    return [pair(turns) for turns in talks]


def pair(turns: Turns, rng: random.Random | None = None) -> tuple[str, str]:
    """Prompt and reply of turns that end with the reply; with ``rng`` some get a system prompt."""
    clean = [" ".join(turn.split()) for turn in turns]
    lines = [f"{ROLES[place % 2]}: {turn}" for place, turn in enumerate(clean[:-1])]
    if rng and rng.random() < SYSTEM_SHARE:
        short = len(re.findall(r"[.!?]+", clean[-1])) < 2
        lines.insert(0, f"System: {rng.choice((*SYSTEM_PROMPTS, SHORT_PROMPT) if short else SYSTEM_PROMPTS)}")
    return "\n".join([*lines, "Falcon:"]), f" {clean[-1]}{END}"


def fact_talks(kinds: int, times: int, rng: random.Random) -> list[Turns]:
    """``kinds`` questions about kinds of things, with their answers; all other facts and small talk ``times`` times."""
    facts = read_facts()
    makers: list[Callable[[Facts, random.Random], Turns]] = [_choice, _choice, _choice, _what, _list, _repeat]
    made = [rng.choice(makers)(facts, rng) for _ in range(kinds)]
    return [*made, *[*_pairs(facts), *_small_talk(facts)] * times]


def with_article(thing: str, uncountable: Sequence[str] = ()) -> str:
    """``an owl``, ``a pear``; ``milk`` stays as it is."""
    return thing if thing in uncountable else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _split(path: Path, held_out: int, recipe: Mapping[str, Any]) -> tuple[list[Turns], list[Turns]]:
    """(held out, the others), in an order drawn with the seed; one held out begins as no other of its file."""
    frozen = frozen_nouns()
    talks = [turns for turns in conversations(path) if not frozen.search(" ".join(turns))]
    random.Random(recipe["seed"]).shuffle(talks)
    begins = Counter(_plain(turns[0]) for turns in talks)
    chosen = [turns for turns in talks if begins[_plain(turns[0])] == 1][:held_out]
    return chosen, [turns for turns in talks if turns not in chosen]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _talks(data: Path, recipe: Mapping[str, Any], rng: random.Random) -> Iterator[Turns]:
    for name, settings in recipe["chat"]["files"].items():
        _, talks = _split(data / name, settings["held_out"], recipe)
        for turns in talks[: settings["talks"]]:
            places = range(1, len(turns), 2)
            for last in rng.sample(places, min(settings.get("replies", 1), len(places))):
                yield turns[max(0, last - HISTORY) : last + 1]


def _stories(data: Path, recipe: Mapping[str, Any], rng: random.Random) -> Iterator[Turns]:
    """Each short story without a frozen noun, asked for as such, and by the thing that it mentions most."""
    facts, frozen = read_facts(), frozen_nouns()
    things = [thing for kind in facts["told_of"] for thing in facts["kinds"][kind]]
    most = recipe["chat"]["story_max_characters"]
    for story in training_stories(data, recipe):
        if len(story) > most or frozen.search(story):
            continue
        yield [rng.choice(REQUESTS), story]
        mentions = {thing: len(re.findall(rf"\b(?:an?|the) (?:\w+ )?{thing}\b", story, re.I)) for thing in things}
        about = max(things, key=lambda thing: mentions[thing])
        if mentions[about] > 1:
            yield from ([request.format(thing=with_article(about)), story] for request in REQUESTS_ABOUT)


def _choice(facts: Facts, rng: random.Random) -> Turns:
    """One of two things, by its kind; where one is an animal, the other is as often asked for, as "a thing" too."""
    kinds = list(facts["kinds"])
    first = "animal" if rng.random() < ANIMAL_SHARE else rng.choice(kinds)
    second = rng.choice([kind for kind in kinds if kind != first and [first, kind] not in facts["overlapping"]])
    right, wrong = (first, second) if rng.random() < 0.5 else (second, first)
    named = "a thing" if wrong == "animal" and rng.random() < 0.5 else with_article(right)
    answer, other = (with_article(rng.choice(facts["kinds"][kind]), facts["uncountable"]) for kind in (right, wrong))
    both = (answer, other) if rng.random() < 0.5 else (other, answer)
    question = rng.choice(CHOICES).format(kind=named, first=both[0], second=both[1])
    return [question, f"{_capital(answer)} is {named}."]


def _what(facts: Facts, rng: random.Random) -> Turns:
    kind = rng.choice(list(facts["kinds"]))
    thing = with_article(rng.choice(facts["kinds"][kind]), facts["uncountable"])
    return [rng.choice(WHAT).format(thing=thing), f"{_capital(thing)} is {with_article(kind)}."]


def _list(facts: Facts, rng: random.Random) -> Turns:
    kind = rng.choice(list(facts["kinds"]))
    first, second, third = rng.sample(facts["kinds"][kind], 3)
    head, _, tail = kind.partition(" ")
    kinds = f"{head}s {tail}" if tail.startswith("of") else f"{kind}s"
    return [rng.choice(LISTS).format(kinds=kinds), f"{_capital(first)}, {second} and {third}."]


def _repeat(facts: Facts, rng: random.Random) -> Turns:
    word = rng.choice(facts["kinds"][rng.choice(list(facts["kinds"]))])
    return [rng.choice(REPEATS).format(word=word), f"{_capital(word)}."]


def _pairs(facts: Facts) -> Iterator[Turns]:
    for group in facts["pairs"]:
        for (a, b), ask in itertools.product(group["of"], group["ask"]):
            yield [ask.format(a=a, b=b), _capital(group["reply"].format(a=a, b=b))]


def _small_talk(facts: Facts) -> Iterator[Turns]:
    for group in facts["talk"]:
        yield from ([ask, reply] for ask, reply in itertools.product(group["ask"], group["reply"]))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
