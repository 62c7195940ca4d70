"""How good falcon-mini is, measured on texts that no training step saw; a second model judges its fluency."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from helpers import stats
from helpers.comparison import names
from helpers.evaluation import Question, multiple_choice
from helpers.generation import Prompt, generate_batch
from helpers.miniature.talk import with_article
from helpers.miniature.texts import END, read_nouns
from helpers.prompts import encode
from helpers.types import Interval, Loaded, Message, Reply, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 25
OPENING_WORDS = 20  # of a story, to be continued
CONTINUATION = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=120)
THREAD_WORDS = (60, 25)  # of an opening, and of what follows it
CHAT = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=150)
CHOICE = Sampling(temperature=0, max_new_tokens=16)


@dataclass(frozen=True)
class Fluency:
    """Sampled continuations of story openings beside the true ones, all of at most 120 tokens.

    perplexity_ratio: the judge's median perplexity of the samples over that of the true continuations; an empty
    sample counts as infinitely perplexing.
    trigram_ratio: the share of distinct ones among the word trigrams of a text, the mean over the samples over the
    mean over the true continuations: below 1 the samples repeat themselves. Each pair is cut to as many words.
    pooled_trigram_ratio: the same share over the trigrams of all texts together, one sample for each opening, the mean
    over the rounds: below 1 the samples are more alike than the true texts are.
    """

    perplexity_ratio: float
    trigram_ratio: float
    pooled_trigram_ratio: float
    samples: tuple[tuple[str, str], ...]  # opening, continuation


@dataclass(frozen=True)
class ChatReplies:
    """Replies to user messages: how many end by themselves, speak for the user, or say a sentence twice."""

    messages: tuple[str, ...]
    replies: tuple[Reply, ...]

    @property
    def ended(self) -> Interval:
        """The share that ended at the end token or a stop string."""
        return _share([reply.finish_reason != "length" for reply in self.replies])

    @property
    def speaking_for_the_user(self) -> Interval:
        """The share with ``User:`` in it, or that went on to another speaker's line, where a stop string cut it."""
        return _share([reply.finish_reason == "stop" or "User:" in reply.text for reply in self.replies])

    @property
    def repeating(self) -> Interval:
        """The share that says a sentence of two words or more twice."""
        return _share([repeats_a_sentence(reply.text) for reply in self.replies])


@dataclass(frozen=True)
class TwoChoices:
    """ "Which is an animal, a goat or a ladder?", and the control, the same with "a thing", each pair in both orders.

    A choice is the likelier of "A goat is an animal." and "A ladder is an animal."; an answer is what the model wrote,
    right where it names the right one and not the other. A mere taste for words for animals, or for the first of two,
    gains on the question what it loses on the control: the mean of both stays at one half.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    chosen: tuple[bool, ...]
    control_chosen: tuple[bool, ...]
    written: tuple[bool, ...]
    control_written: tuple[bool, ...]

    @property
    def accuracy(self) -> Interval:
        """The share of animals chosen where an animal was asked for; chance is one half."""
        return _share(self.chosen)

    @property
    def control(self) -> Interval:
        """The share of things chosen where a thing was asked for; chance is one half."""
        return _share(self.control_chosen)

    @property
    def balanced(self) -> Interval:
        """The share right over questions and controls together; one half for any taste."""
        return _share(self.chosen + self.control_chosen)

    @property
    def written_balanced(self) -> Interval:
        """The share of right written answers to questions and controls together; at most one half for any taste."""
        return _share(self.written + self.control_written)


def fluency(loaded: Loaded, judge: Loaded, stories: Sequence[str], rounds: int = 2, most: int = 100) -> Fluency:
    """Continues the openings of at most ``most`` stories, ``rounds`` times, and lets the judge read what came.

    Every sample has a seed of its own. Raises ValueError where no story is long enough to be continued.
    """
    pairs = [pair for story in stories if (pair := _opening(loaded.tokenizer, story))][:most]
    if not pairs:
        raise ValueError(f"no story has {CONTINUATION.max_new_tokens} tokens after {OPENING_WORDS} words")
    openings, true = zip(*pairs, strict=True)
    prompts = [END + opening for opening in openings] * rounds
    texts = [reply.text.rstrip() for reply in _replies(loaded, prompts, CONTINUATION)]
    sampled = _perplexities(judge, openings * rounds, texts)
    each_round = [texts[start : start + len(pairs)] for start in range(0, len(texts), len(pairs))]
    return Fluency(
        median(sampled) / median(_perplexities(judge, openings, true)),
        _trigram_ratio(texts, true * rounds),
        fmean(_pooled_trigram_ratio(part, true) for part in each_round),
        tuple(zip(openings * rounds, texts, strict=True)),
    )


def follows_the_thread(loaded: Loaded, stories: Sequence[str], pairs: int = 100) -> Interval:
    """How often an opening raises the log-likelihood of what really follows more than that of another story's text.

    Of each story long enough the first 60 words are the opening, the next 25 its continuation; the other one is the
    next story's. Both begin as a text does in training, after the end token. Raises ValueError for fewer than two such
    stories.
    """
    parts = [part for story in stories if (part := _opening_and_next(story, *THREAD_WORDS))][:pairs]
    if len(parts) < 2:
        raise ValueError(f"fewer than two stories have {sum(THREAD_WORDS)} words")
    openings, following = zip(*parts, strict=True)
    options = list(zip(following, (*following[1:], following[0]), strict=True))
    after = multiple_choice(loaded, [Question(END + o, both, 0) for o, both in zip(openings, options, strict=True)])
    alone = multiple_choice(loaded, [Question(END, both, 0) for both in options])
    gains = [
        (true - true_alone, other - other_alone)
        for (true, other), (true_alone, other_alone) in zip(after.log_likelihoods, alone.log_likelihoods, strict=True)
    ]
    return stats.proportion(sum(true > other for true, other in gains), len(gains))


def chat_replies(loaded: Loaded, messages: Sequence[str]) -> ChatReplies:
    """Replies of at most 150 tokens to user messages, each a conversation of its own, with a seed of its own."""
    return ChatReplies(tuple(messages), tuple(_replies(loaded, [_asked(text) for text in messages], CHAT)))


def two_choices(loaded: Loaded, count: int = 100, seed: int = 0) -> TwoChoices:
    """Asks which of two frozen nouns is an animal, and which a thing; each pair in both orders, greedily.

    Raises ValueError for a count below 2.
    """
    pairs = noun_pairs(count // 2, seed)
    ordered = [order for animal, thing in pairs for order in ((animal, thing), (thing, animal))]
    both = [pair for pair in pairs for _ in range(2)]
    asked = {kind: [_question(kind, *order) for order in ordered] for kind in ("an animal", "a thing")}
    found = {}
    for place, (kind, questions) in enumerate(asked.items()):
        right = [(pair[place], pair[1 - place]) for pair in both]
        options = [tuple(_answer(noun, kind) for noun in nouns) for nouns in right]
        choices = [Question(_asked(q), texts, 0) for q, texts in zip(questions, options, strict=True)]
        texts = [reply.text.strip() for reply in _replies(loaded, [_asked(q) for q in questions], CHOICE)]
        named = tuple(
            names(text, one) and not names(text, other) for text, (one, other) in zip(texts, right, strict=True)
        )
        found[kind] = (tuple(texts), multiple_choice(loaded, choices).correct, named)
    (answers, chosen, written), (_, control_chosen, control_written) = found["an animal"], found["a thing"]
    questions = tuple(asked["an animal"])
    return TwoChoices(questions, answers, chosen, control_chosen, written, control_written)


def noun_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(animal, other thing) pairs of the frozen nouns, drawn with the seed: no pair twice, all nouns alike often.

    Raises ValueError for more pairs than there are.
    """
    rng, rows = random.Random(seed), read_nouns()
    animals = [row["noun"] for row in rows if row["kind"] == "animal"]
    things = [row["noun"] for row in rows if row["kind"] != "animal"]
    if count > len(animals) * len(things):
        raise ValueError(f"there are {len(animals) * len(things)} pairs, not {count}")
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:  # a round of all nouns after the other, without what came before
        pairs |= dict.fromkeys(zip(rng.sample(animals, len(animals)), rng.sample(things, len(things)), strict=False))
    return list(pairs)[:count]


def repeats_a_sentence(text: str) -> bool:
    """True where a sentence of two words or more comes twice, whatever its case and its other punctuation."""
    sentences = [" ".join(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?\n]+", text)]
    long = [sentence for sentence in sentences if " " in sentence]
    return len(long) > len(set(long))


def distinct_trigrams(texts: Sequence[str], words: int) -> float:
    """The share of distinct ones among the word trigrams of the texts' first ``words`` words in all.

    Raises ValueError where these hold no trigram.
    """
    found: list[tuple[str, ...]] = []
    for text in texts:
        part = text.split()[: max(words, 0)]
        words -= len(part)
        found += zip(part, part[1:], part[2:], strict=False)
    if not found:
        raise ValueError("no text has three words")
    return len(set(found)) / len(found)


def _opening(tokenizer: PreTrainedTokenizerBase, story: str) -> tuple[str, str] | None:
    """The opening of a story and as many tokens of it as a sample may have; None where the story is too short."""
    if not (parts := _opening_and_next(story, OPENING_WORDS, 1)):
        return None
    rest = encode(tokenizer, story[len(parts[0]) :])
    most = CONTINUATION.max_new_tokens
    return (parts[0], tokenizer.decode(rest[:most])) if len(rest) >= most else None


def _opening_and_next(story: str, words: int, following: int) -> tuple[str, str] | None:
    """The first words of a story, and so many after them with the white space before; None where it is too short."""
    ends = [match.end() for match in re.finditer(r"\S+", story)]
    if len(ends) < words + following:
        return None
    return story[: ends[words - 1]], story[ends[words - 1] : ends[words + following - 1]]


def _replies(loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
    """A reply to each prompt; the seed of each is its place."""
    from transformers.utils.logging import tqdm

    starts = range(0, len(prompts), BATCH)
    return [
        reply
        for start in tqdm(starts, desc="replies", unit="batch", delay=2, leave=False)
        for reply in generate_batch(
            loaded, prompts[start : start + BATCH], sampling, range(start, min(start + BATCH, len(prompts)))
        )
    ]


def _perplexities(judge: Loaded, openings: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The judge's perplexity of each text after its opening; infinite for an empty one."""
    asked = [(opening, text) for opening, text in zip(openings, texts, strict=True) if text.strip()]
    found = multiple_choice(judge, [Question(opening, (text, " the"), 0) for opening, text in asked]).log_likelihoods
    values = [
        math.exp(-value / (len(encode(judge.tokenizer, opening + text)) - len(encode(judge.tokenizer, opening))))
        for (opening, text), (value, _) in zip(asked, found, strict=True)
    ]
    return values + [math.inf] * (len(texts) - len(asked))


def _trigram_ratio(samples: Sequence[str], true: Sequence[str]) -> float:
    pairs = [
        (sample, text, min(len(sample.split()), len(text.split()))) for sample, text in zip(samples, true, strict=True)
    ]
    long = [(sample, text, words) for sample, text, words in pairs if words >= 3]
    shares = [(distinct_trigrams([sample], words), distinct_trigrams([text], words)) for sample, text, words in long]
    return fmean(sample for sample, _ in shares) / fmean(text for _, text in shares)


def _pooled_trigram_ratio(samples: Sequence[str], true: Sequence[str]) -> float:
    words = min(sum(len(text.split()) for text in texts) for texts in (samples, true))
    return distinct_trigrams(samples, words) / distinct_trigrams(true, words)


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _question(kind: str, first: str, second: str) -> str:
    return f"Which is {kind}, {with_article(first)} or {with_article(second)}?"


def _answer(noun: str, kind: str) -> str:
    article = with_article(noun)
    return f"{article[0].upper()}{article[1:]} is {kind}."


def _share(found: Sequence[bool]) -> Interval:
    return stats.proportion(sum(found), len(found))
