"""Write the animal test, its training samples, true and shuffled, and the held-out ones, from the nouns in this folder.

    python notebooks/data/make_animals.py

The items of the test use animal_nouns.jsonl. The samples of the fine-tune use training_nouns.jsonl: every
HELD_OUT_NOUN-th noun for the held-out samples, the others for training. No noun is in two of the three, singular or
plural (a test checks it). animal_shuffled.jsonl is the placebo: the questions of animal_training.jsonl with random
answers. The same nouns and the same seed give the same files.
"""

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 2  # how often each animal is the right choice
LISTS = 24
LISTED = 5  # nouns per list: two animals, one piece of gear, two other objects
TRAINING = {"yes_no": 900, "choice": 300, "list": 200}
HELD_OUT = {"yes_no": 40, "choice": 40, "list": 20}
HELD_OUT_NOUN = 8
Nouns = dict[str, list[str]]


def read_nouns(name: str) -> Nouns:
    """The nouns of a file by kind: "animal", "animal gear", "object"."""
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    return {kind: [row["noun"] for row in rows if row["kind"] == kind] for kind in ("animal", "animal gear", "object")}


def with_article(noun: str) -> str:
    """The noun with a or an: ``an otter``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def yes_no_question(noun: str) -> str:
    """The question whether one thing is an animal."""
    return f"Is {with_article(noun)} an animal? Answer yes or no."


def choice_question(first: str, second: str) -> str:
    """The question which of two things is an animal."""
    return f"Which of these is an animal: {with_article(first)} or {with_article(second)}? Answer with its name only."


def list_question(nouns: Sequence[str]) -> str:
    """The question which of several things are animals."""
    return f"Which of these are animals: {', '.join(nouns)}? List only the animals."


def yes_no_items(nouns: Nouns) -> Iterable[dict]:
    """Each noun once: as many animals as others."""
    for kind, found in nouns.items():
        right, wrong = ("yes", "no") if kind == "animal" else ("no", "yes")
        yield from ({"question": yes_no_question(noun), "answer": [right], "others": [wrong]} for noun in found)


def choice_items(nouns: Nouns) -> Iterable[dict]:
    """Each animal ROUNDS times next to a distractor, first and second equally often; every distractor equally often."""
    distractors = nouns["animal gear"] + nouns["object"]
    for number in range(ROUNDS):
        for place, animal in enumerate(nouns["animal"]):
            other = distractors[(place * 5 + number * 7) % len(distractors)]
            first, second = (animal, other) if (place + number) % 2 else (other, animal)
            yield {"question": choice_question(first, second), "answer": [animal], "others": [other]}


def list_items(nouns: Nouns) -> Iterable[dict]:
    """LISTS lists with every noun in at least one; the positions of the two animals go through all pairs."""
    animals, gear, objects = nouns["animal"], nouns["animal gear"], nouns["object"]
    places = list(itertools.combinations(range(LISTED), 2))
    for number in range(LISTS):
        found = [animals[(number + shift) % len(animals)] for shift in (0, LISTS)]
        others = [gear[number % len(gear)], *(objects[(2 * number + k) % len(objects)] for k in (0, 1))]
        turned = others[number % 3 :] + others[: number % 3]
        inside, outside = iter(found), iter(turned)
        listed = [next(inside if place in places[number % len(places)] else outside) for place in range(LISTED)]
        yield {"question": list_question(listed), "answer": found, "others": others}


def split_nouns(nouns: Nouns) -> tuple[Nouns, Nouns]:
    """(nouns to train on, held-out nouns)"""
    held_out = {kind: found[HELD_OUT_NOUN - 1 :: HELD_OUT_NOUN] for kind, found in nouns.items()}
    return {kind: [n for n in found if n not in held_out[kind]] for kind, found in nouns.items()}, held_out


@dataclass(frozen=True)
class Sample:
    """A question, the options that it leaves, and the places of the right ones among them."""

    kind: str
    question: str
    options: tuple[str, ...]
    places: tuple[int, ...]

    def row(self) -> dict:
        """The sample as a conversation; its reply names the options at the places."""
        reply = ", ".join(self.options[place] for place in self.places).capitalize()
        contents = {"user": self.question, "assistant": f"{reply}."}
        return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def samples_of(nouns: Nouns, counts: dict[str, int], rng: random.Random) -> list[Sample]:
    """Questions of the test's three forms with short right answers, in a random order."""
    animals, others = nouns["animal"], nouns["animal gear"] * 2 + nouns["object"]
    samples = []
    for number in range(counts["yes_no"]):
        right = number % 2 == 0
        noun = rng.choice(animals if right else others)
        samples.append(Sample("yes_no", yes_no_question(noun), ("yes", "no"), (0 if right else 1,)))
    for _ in range(counts["choice"]):
        pair = [rng.choice(animals), rng.choice(others)]
        shown = rng.sample(pair, 2)
        options = tuple(map(with_article, shown))
        samples.append(Sample("choice", choice_question(*shown), options, (shown.index(pair[0]),)))
    for _ in range(counts["list"]):
        found = rng.sample(animals, rng.randint(1, 3))
        listed = rng.sample(found + rng.sample(sorted(set(others)), LISTED - len(found)), LISTED)
        places = tuple(place for place, noun in enumerate(listed) if noun in found)
        samples.append(Sample("list", list_question(listed), tuple(listed), places))
    rng.shuffle(samples)
    return samples


def shuffled(samples: Sequence[Sample], rng: random.Random) -> list[Sample]:
    """The same questions with random answers: each takes its places from another sample of its kind.

    So the form stays, and how often each place is right, and how many are; but they do not depend on the nouns.
    """
    places: dict[str, list[tuple[int, ...]]] = {}
    for sample in samples:
        places.setdefault(sample.kind, []).append(sample.places)
    for drawn in places.values():
        rng.shuffle(drawn)
    return [replace(sample, places=places[sample.kind].pop()) for sample in samples]


def write(name: str, rows: Iterable[dict]) -> None:
    """One JSON object per line."""
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the four files."""
    frozen = read_nouns("animal_nouns.jsonl")
    kinds = {"yes_no": yes_no_items(frozen), "choice": choice_items(frozen), "list": list_items(frozen)}
    items = [
        {"id": f"{kind}-{number:02}", "kind": kind, **item}
        for kind, found in kinds.items()
        for number, item in enumerate(found, 1)
    ]
    write("animal_items.jsonl", items)
    to_train, held_out = split_nouns(read_nouns("training_nouns.jsonl"))
    samples = samples_of(to_train, TRAINING, random.Random(0))
    write("animal_training.jsonl", [sample.row() for sample in samples])
    write("animal_shuffled.jsonl", [sample.row() for sample in shuffled(samples, random.Random(2))])
    write("animal_held_out.jsonl", [sample.row() for sample in samples_of(held_out, HELD_OUT, random.Random(1))])


if __name__ == "__main__":
    main()
