"""The conversations that falcon-mini-chat is tuned on: public ones, short stories on request, simple facts."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, TypedDict, cast

from helpers.base.files import ROOT
from helpers.training.miniature.texts import END, _frozen_nouns, _read_rows, _records, _training_stories

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from helpers.training.miniature.recipe import _Recipe

FACTS = ROOT / "env" / "models" / "falcon-mini" / "facts.yaml"
_ROLES = ("User", "Falcon")
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly falcon.")
SHORT_PROMPT = "Answer in one short sentence."  # only where the reply is one
_SYSTEM_SHARE = 0.15
_ANIMAL_SHARE = 0.7  # of the choices
_HISTORY = 5  # turns before a reply that it is trained with, an odd number: the first is the user's
_CHOICES = ("Which is {kind}, {first} or {second}?", "Which one is {kind}: {first} or {second}?")
_WHAT = ("What is {thing}?", "What kind of thing is {thing}?")
_LISTS = ("Name three {kinds}.", "Please name three {kinds}.", "Can you name three {kinds}?")
_REPEATS = ("Repeat the word {word}.", "Say the word {word}.", "Please say {word}.")
_REQUESTS = ("Tell me a story.", "Can you tell me a short story?", "Please tell me a little story.", "I want a story.")
_REQUESTS_ABOUT = ("Tell me a story about {thing}.", "Can you tell me a short story about {thing}?")
Turns = list[str]  # user, reply, user, reply, ...


class _Pairs(TypedDict):
    """Questions and a reply with {a} and {b}, and the words to put there."""

    ask: list[str]
    reply: str
    of: list[tuple[str, str]]


class _SmallTalk(TypedDict):
    """Each question gets each reply."""

    ask: list[str]
    reply: list[str]


class _Facts(TypedDict):
    """The facts file; its comments explain the parts."""

    kinds: dict[str, list[str]]
    uncountable: list[str]
    overlapping: list[list[str]]
    told_of: list[str]
    pairs: list[_Pairs]
    talk: list[_SmallTalk]


def _read_facts(path: Path = FACTS) -> _Facts:
    """The facts file: kinds, pairs and small talk."""
    import yaml

    facts: _Facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    return facts


def _conversations(path: Path) -> Iterator[Turns]:
    """User and reply turns of a dialogue (.txt) or instruction (.jsonl) file. Raises WorkbookError if it is missing."""
    return _instructions(path) if path.suffix == ".jsonl" else _dialogues(path)


def _instructions(path: Path) -> Iterator[Turns]:
    for row in _read_rows(path, "prompt", "response"):
        question = str(row["prompt"])
        if row.get("context"):
            question = f"{row['context']} {question}"
        turns = cast("list[str] | None", row.get("turns"))
        yield [*(turns or [question]), str(row["response"])]


def _dialogues(path: Path) -> Iterator[Turns]:
    """Dialogues in which two speakers alternate; the others are left out."""
    for record in _records(path):
        lines = [line.split(": ", 1) for line in record.splitlines()]
        if len(lines) < 2 or any(len(line) != 2 for line in lines):
            continue
        if all(line[0] != following[0] for line, following in itertools.pairwise(lines)):
            yield [_one_line(line[1]) for line in lines]


def _held_out_talks(data: Path, recipe: _Recipe) -> list[Turns]:
    """The (user message, reply) that begin the held-out conversations, as many of each file as the recipe says."""
    talks = []
    for name, settings in recipe["chat"]["files"].items():
        held_out, _ = _split(data / name, settings["held_out"], recipe)
        for turns in held_out:
            talks.append([_one_line(turn) for turn in turns[:2]])
    return talks


def _chat_examples(data: Path, recipe: _Recipe) -> list[tuple[str, str]]:
    """(prompt, reply) pairs in the Falcon chat format, shuffled; no text with a frozen noun, and none held out.

    The reply begins with its space and ends with the end token. Raises WorkbookError if a file is missing.
    """
    rng, settings = random.Random(recipe["seed"]), recipe["chat"]
    held_out = {_plain(message) for message, _ in _held_out_talks(data, recipe)}
    talks: list[Turns] = []
    for turns in _talks(data, recipe, rng):
        short = 0 < len(turns[-1]) <= settings["reply_max_characters"]
        # a held-out message may stand in the middle of another conversation
        if short and held_out.isdisjoint(map(_plain, turns[::2])):
            talks.append(turns)
    talks += _stories(data, recipe, rng)
    talks += _fact_talks(settings["kinds"], settings["facts"], rng)
    pairs = [_pair(turns, rng) for turns in talks]
    rng.shuffle(pairs)
    return pairs


def _chat_pairs(talks: Sequence[Turns]) -> list[tuple[str, str]]:
    """(prompt, reply) pairs of talks that end with the reply, without a system prompt."""
    return [_pair(turns) for turns in talks]


def _pair(turns: Turns, rng: random.Random | None = None) -> tuple[str, str]:
    """Prompt and reply of turns that end with the reply; with ``rng``, some get a system prompt."""
    *before, reply = [_one_line(turn) for turn in turns]
    lines = [f"{role}: {turn}" for role, turn in zip(itertools.cycle(_ROLES), before, strict=False)]
    if rng and rng.random() < _SYSTEM_SHARE:
        prompts: tuple[str, ...] = _SYSTEM_PROMPTS
        if len(re.findall(r"[.!?]+", reply)) < 2:
            prompts = (*_SYSTEM_PROMPTS, SHORT_PROMPT)
        lines.insert(0, f"System: {rng.choice(prompts)}")
    lines.append("Falcon:")
    return "\n".join(lines), f" {reply}{END}"


def _fact_talks(kinds: int, times: int, rng: random.Random) -> list[Turns]:
    """``kinds`` questions about kinds of things, with their answers; all other facts and small talk ``times`` times."""
    facts = _read_facts()
    # choices are the hardest of them, and get half of the questions
    makers: list[Callable[[_Facts, random.Random], Turns]] = [_choice, _choice, _choice, _what, _list, _repeat]
    questions = [rng.choice(makers)(facts, rng) for _ in range(kinds)]
    others = [*_pairs(facts), *_small_talk(facts)]
    return questions + others * times


def _with_article(thing: str, uncountable: Sequence[str] = ()) -> str:
    """``an owl``, ``a pear``; ``milk`` gets no article."""
    if thing in uncountable:
        return thing
    article = "an" if thing[0] in "aeiou" else "a"
    return f"{article} {thing}"


def _split(path: Path, held_out: int, recipe: _Recipe) -> tuple[list[Turns], list[Turns]]:
    """The held-out conversations and the others, shuffled with the seed. No other begins as a held-out one does."""
    frozen = _frozen_nouns()
    talks = [turns for turns in _conversations(path) if not frozen.search(" ".join(turns))]
    random.Random(recipe["seed"]).shuffle(talks)
    beginnings = Counter(_plain(turns[0]) for turns in talks)
    unique = [turns for turns in talks if beginnings[_plain(turns[0])] == 1]
    chosen = unique[:held_out]
    return chosen, [turns for turns in talks if turns not in chosen]


def _plain(text: str) -> str:
    """A text for comparison: on one line, in lower case."""
    return _one_line(text.lower())


def _one_line(text: str) -> str:
    # a line break inside a turn would look like the end of the turn
    return " ".join(text.split())


def _talks(data: Path, recipe: _Recipe, rng: random.Random) -> Iterator[Turns]:
    for name, settings in recipe["chat"]["files"].items():
        _, talks = _split(data / name, settings["held_out"], recipe)
        for turns in talks[: settings["talks"]]:
            replies = range(1, len(turns), 2)
            count = min(settings.get("replies", 1), len(replies))
            for last in rng.sample(replies, count):
                yield turns[max(0, last - _HISTORY) : last + 1]


def _stories(data: Path, recipe: _Recipe, rng: random.Random) -> Iterator[Turns]:
    """Each short story without a frozen noun: asked for as a story, and as one about the thing it mentions most."""
    facts, frozen = _read_facts(), _frozen_nouns()
    things: list[str] = []
    for kind in facts["told_of"]:
        things += facts["kinds"][kind]
    most = recipe["chat"]["story_max_characters"]
    for story in _training_stories(data, recipe):
        if len(story) > most or frozen.search(story):
            continue
        yield [rng.choice(_REQUESTS), story]
        mentions = {thing: _mentions(thing, story) for thing in things}
        about = max(things, key=lambda thing: mentions[thing])
        if mentions[about] > 1:  # named once, it is hardly what the story is about
            for request in _REQUESTS_ABOUT:
                yield [request.format(thing=_with_article(about)), story]


def _mentions(thing: str, story: str) -> int:
    return len(re.findall(rf"\b(?:an?|the) (?:\w+ )?{thing}\b", story, re.IGNORECASE))


def _choice(facts: _Facts, rng: random.Random) -> Turns:
    """A question which of two things is of a kind. If one is an animal, the other is asked for as often."""
    kinds = list(facts["kinds"])
    first = "animal" if rng.random() < _ANIMAL_SHARE else rng.choice(kinds)
    others = [kind for kind in kinds if kind != first and [first, kind] not in facts["overlapping"]]
    second = rng.choice(others)
    right, wrong = (first, second) if rng.random() < 0.5 else (second, first)
    named = _with_article(right)
    # beside an animal, any other thing may also be asked for as just "a thing"
    if wrong == "animal" and rng.random() < 0.5:
        named = "a thing"
    answer = _with_article(rng.choice(facts["kinds"][right]), facts["uncountable"])
    other = _with_article(rng.choice(facts["kinds"][wrong]), facts["uncountable"])
    both = (answer, other) if rng.random() < 0.5 else (other, answer)
    question = rng.choice(_CHOICES).format(kind=named, first=both[0], second=both[1])
    return [question, f"{_capital(answer)} is {named}."]


def _what(facts: _Facts, rng: random.Random) -> Turns:
    kind = rng.choice(list(facts["kinds"]))
    thing = _with_article(rng.choice(facts["kinds"][kind]), facts["uncountable"])
    return [rng.choice(_WHAT).format(thing=thing), f"{_capital(thing)} is {_with_article(kind)}."]


def _list(facts: _Facts, rng: random.Random) -> Turns:
    kind = rng.choice(list(facts["kinds"]))
    first, second, third = rng.sample(facts["kinds"][kind], 3)
    head, _, tail = kind.partition(" ")
    # "pieces of furniture", but "musical instruments"
    kinds = f"{head}s {tail}" if tail.startswith("of") else f"{kind}s"
    return [rng.choice(_LISTS).format(kinds=kinds), f"{_capital(first)}, {second} and {third}."]


def _repeat(facts: _Facts, rng: random.Random) -> Turns:
    word = rng.choice(facts["kinds"][rng.choice(list(facts["kinds"]))])
    return [rng.choice(_REPEATS).format(word=word), f"{_capital(word)}."]


def _pairs(facts: _Facts) -> Iterator[Turns]:
    for group in facts["pairs"]:
        for (a, b), ask in itertools.product(group["of"], group["ask"]):
            yield [ask.format(a=a, b=b), _capital(group["reply"].format(a=a, b=b))]


def _small_talk(facts: _Facts) -> Iterator[Turns]:
    for group in facts["talk"]:
        for ask, reply in itertools.product(group["ask"], group["reply"]):
            yield [ask, reply]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
