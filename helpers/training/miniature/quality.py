"""Measure falcon-mini on texts that no training step saw; a second model judges its fluency."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Literal, cast

from helpers.base import stats
from helpers.evaluation.options import Question, multiple_choice
from helpers.evaluation.rules import names
from helpers.generation.generating import generate_batch
from helpers.generation.sampling import Reply, Sampling
from helpers.models.tokens import encode
from helpers.training.miniature.talk import _with_article
from helpers.training.miniature.texts import END, _read_nouns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from helpers.base.stats import Interval
    from helpers.generation.generating import Prompt
    from helpers.models.formats import Message
    from helpers.models.loaded import Loaded

_BATCH = 25
_OPENING_WORDS = 20  # of a story, to be continued
_CONTINUATION = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=120)
_THREAD_WORDS = (60, 25)  # of an opening, and of the text after it
_CHAT = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=150)
_CHOICE = Sampling(temperature=0, max_new_tokens=16)


@dataclass(frozen=True)
class _Fluency:
    """Sampled continuations of story openings, compared with the true ones; all have at most 120 tokens.

    perplexity_ratio: the judge's median perplexity of the samples, divided by that of the true continuations. The
    perplexity of an empty sample counts as infinite.
    trigram_ratio: the share of distinct trigrams among the word trigrams of a text; its mean over the samples, divided
    by its mean over the true continuations. Below 1, the samples repeat themselves. The two texts of a pair are cut to
    the same number of words.
    pooled_trigram_ratio: the same ratio for the trigrams of all texts together, with one sample for each opening; the
    mean over the rounds. Below 1, the samples are more alike than the true texts.
    """

    perplexity_ratio: float
    trigram_ratio: float
    pooled_trigram_ratio: float
    samples: tuple[tuple[str, str], ...]  # opening, continuation


@dataclass(frozen=True)
class _ChatReplies:
    """Replies to user messages, and the shares that end by themselves, speak for the user, or repeat a sentence."""

    messages: tuple[str, ...]
    replies: tuple[Reply, ...]

    @property
    def ended(self) -> Interval:
        """The share that ended at the end token or a stop string."""
        return _share([reply.finish_reason != "length" for reply in self.replies])

    @property
    def speaking_for_the_user(self) -> Interval:
        """The share that contains ``User:``, or that a stop string cut where another speaker's line began."""
        return _share([reply.finish_reason == "stop" or "User:" in reply.text for reply in self.replies])

    @property
    def repeating(self) -> Interval:
        """The share that repeats a sentence of two words or more."""
        return _share([_repeats_a_sentence(reply.text) for reply in self.replies])


@dataclass(frozen=True)
class _TwoChoices:
    """Answers to "Which is an animal, a goat or a ladder?" and to the same with "a thing", the control.

    Each pair is asked about in both orders. A choice is the more likely of "A goat is an animal." and "A ladder is an
    animal."; an answer is what the model wrote, and right if it names the right noun and not the other. A mere
    preference for words for animals, or for the first of two, gains on the question what it loses on the control, so
    the mean of both stays at one half.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    chosen: tuple[bool, ...]
    control_chosen: tuple[bool, ...]
    written: tuple[bool, ...]
    control_written: tuple[bool, ...]

    @property
    def accuracy(self) -> Interval:
        """The share of questions for an animal with the animal chosen; chance is one half."""
        return _share(self.chosen)

    @property
    def control(self) -> Interval:
        """The share of controls with the other thing chosen; chance is one half."""
        return _share(self.control_chosen)

    @property
    def balanced(self) -> Interval:
        """The share of right choices over questions and controls; one half for any mere preference."""
        return _share(self.chosen + self.control_chosen)

    @property
    def written_balanced(self) -> Interval:
        """The share of right answers over questions and controls; at most one half for any mere preference."""
        return _share(self.written + self.control_written)


def _fluency(loaded: Loaded, judge: Loaded, stories: Sequence[str], rounds: int = 2, most: int = 100) -> _Fluency:
    """Continue the openings of at most ``most`` stories, ``rounds`` times, and let the judge score the samples.

    Every sample has a seed of its own. Raises ValueError if no story is long enough.
    """
    pairs: list[tuple[str, str]] = []
    for story in stories:
        if len(pairs) == most:
            break
        if pair := _opening(loaded.tokenizer, story):
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"No story has {_CONTINUATION.max_new_tokens} tokens after {_OPENING_WORDS} words.")
    openings = [opening for opening, _ in pairs]
    true = [continuation for _, continuation in pairs]
    # an opening begins as a text does in training, after the end token
    prompts = [END + opening for opening in openings] * rounds
    texts = [reply.text.rstrip() for reply in _replies(loaded, prompts, _CONTINUATION)]
    sampled = _perplexities(judge, openings * rounds, texts)
    pooled = []
    for start in range(0, len(texts), len(pairs)):
        pooled.append(_pooled_trigram_ratio(texts[start : start + len(pairs)], true))
    return _Fluency(
        median(sampled) / median(_perplexities(judge, openings, true)),
        _trigram_ratio(texts, true * rounds),
        fmean(pooled),
        tuple(zip(openings * rounds, texts, strict=True)),
    )


def _follows_the_thread(loaded: Loaded, stories: Sequence[str], pairs: int = 100) -> Interval:
    """How often an opening raises the log-likelihood of its true continuation more than that of another story's text.

    The opening is the first 60 words of a story, its continuation the next 25; the other text is the continuation of
    the next story. Both begin as a text does in training, after the end token. Raises ValueError if fewer than two
    stories are long enough.
    """
    parts: list[tuple[str, str]] = []
    for story in stories:
        if len(parts) == pairs:
            break
        if part := _opening_and_next(story, *_THREAD_WORDS):
            parts.append(part)
    if len(parts) < 2:
        raise ValueError(f"Fewer than two stories have {sum(_THREAD_WORDS)} words.")
    after, alone = [], []
    for number, (opening, true) in enumerate(parts):
        _, other = parts[(number + 1) % len(parts)]
        after.append(Question(END + opening, (true, other), 0))
        alone.append(Question(END, (true, other), 0))
    with_opening = multiple_choice(loaded, after).log_likelihoods
    without = multiple_choice(loaded, alone).log_likelihoods
    followed = []
    for (true_after, other_after), (true_alone, other_alone) in zip(with_opening, without, strict=True):
        followed.append(true_after - true_alone > other_after - other_alone)
    return _share(followed)


def _chat_replies(loaded: Loaded, messages: Sequence[str]) -> _ChatReplies:
    """Replies of at most 150 tokens to user messages, each a conversation of its own, with a seed of its own."""
    return _ChatReplies(tuple(messages), tuple(_replies(loaded, [_asked(text) for text in messages], _CHAT)))


def _two_choices(loaded: Loaded, count: int = 100, seed: int = 0) -> _TwoChoices:
    """Ask which of two frozen nouns is an animal, and which a thing; each pair in both orders, greedily.

    Raises ValueError if ``count`` is below 2.
    """
    pairs = _noun_pairs(count // 2, seed)
    asked = _asked_twice(loaded, "an animal", pairs)
    control = _asked_twice(loaded, "a thing", pairs)
    return _TwoChoices(asked.questions, asked.answers, asked.chosen, control.chosen, asked.named, control.named)


@dataclass(frozen=True)
class _Asked:
    """Questions of one kind, what the model wrote, and whether it chose and named the right noun."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    chosen: tuple[bool, ...]
    named: tuple[bool, ...]


def _asked_twice(loaded: Loaded, kind: Literal["an animal", "a thing"], pairs: Sequence[tuple[str, str]]) -> _Asked:
    """Ask which of each (animal, other thing) is of a kind, in both orders."""
    questions, choices, nouns = [], [], []
    for animal, thing in pairs:
        right, wrong = (animal, thing) if kind == "an animal" else (thing, animal)
        for first, second in ((animal, thing), (thing, animal)):
            question = _question(kind, first, second)
            questions.append(question)
            choices.append(Question(_asked(question), (_answer(right, kind), _answer(wrong, kind)), 0))
            nouns.append((right, wrong))
    replies = _replies(loaded, [_asked(question) for question in questions], _CHOICE)
    answers = [reply.text.strip() for reply in replies]
    named = []
    for answer, (right, wrong) in zip(answers, nouns, strict=True):
        named.append(names(answer, right) and not names(answer, wrong))
    return _Asked(tuple(questions), tuple(answers), multiple_choice(loaded, choices).correct, tuple(named))


def _noun_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(animal, other thing) pairs of the frozen nouns, drawn with the seed; no pair comes twice.

    All nouns come about equally often. Raises ValueError if there are fewer pairs.
    """
    rng, rows = random.Random(seed), _read_nouns()
    animals = [row["noun"] for row in rows if row["kind"] == "animal"]
    things = [row["noun"] for row in rows if row["kind"] != "animal"]
    if count > len(animals) * len(things):
        raise ValueError(f"There are {len(animals) * len(things)} pairs, not {count}.")
    pairs: dict[tuple[str, str], None] = {}
    # round after round, each with every noun once; a pair of an earlier round is not counted again
    while len(pairs) < count:
        shuffled = zip(rng.sample(animals, len(animals)), rng.sample(things, len(things)), strict=False)
        pairs.update(dict.fromkeys(shuffled))
    return list(pairs)[:count]


def _repeats_a_sentence(text: str) -> bool:
    """Whether a sentence of two words or more comes twice, ignoring case and punctuation inside it."""
    seen = set()
    for part in re.split(r"[.!?\n]+", text):
        words = re.findall(r"\w+", part.lower())
        sentence = " ".join(words)
        if len(words) > 1 and sentence in seen:
            return True
        seen.add(sentence)
    return False


def _distinct_trigrams(texts: Sequence[str], words: int) -> float:
    """The share of distinct trigrams among the word trigrams of the first ``words`` words of all texts together.

    Raises ValueError if there is no trigram.
    """
    trigrams: list[tuple[str, ...]] = []
    for text in texts:
        part = text.split()[: max(words, 0)]
        words -= len(part)
        # within a text: no trigram runs from one text into the next
        trigrams += zip(part, part[1:], part[2:], strict=False)
    if not trigrams:
        raise ValueError("No text has three words.")
    return len(set(trigrams)) / len(trigrams)


def _opening(tokenizer: PreTrainedTokenizerBase, story: str) -> tuple[str, str] | None:
    """A story's opening and as many tokens after it as a sample may have; None if the story is too short."""
    parts = _opening_and_next(story, _OPENING_WORDS, 1)
    if parts is None:
        return None
    opening, _ = parts
    rest = encode(tokenizer, story[len(opening) :])
    most = _CONTINUATION.max_new_tokens
    if len(rest) < most:
        return None
    return opening, cast("str", tokenizer.decode(rest[:most]))


def _opening_and_next(story: str, words: int, following: int) -> tuple[str, str] | None:
    """The first ``words`` words of a story, and the ``following`` after them with their space; None if too short."""
    ends = [match.end() for match in re.finditer(r"\S+", story)]
    if len(ends) < words + following:
        return None
    return story[: ends[words - 1]], story[ends[words - 1] : ends[words + following - 1]]


def _replies(loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
    """A reply to each prompt; the seed of each is its position."""
    from transformers.utils.logging import tqdm

    replies: list[Reply] = []
    for start in tqdm(range(0, len(prompts), _BATCH), desc="replies", unit="batch", delay=2, leave=False):
        batch = prompts[start : start + _BATCH]
        replies += generate_batch(loaded, batch, sampling, range(start, start + len(batch)))
    return replies


def _perplexities(judge: Loaded, openings: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The judge's perplexity of each text after its opening, those of empty texts at the end: they are infinite."""
    pairs = [(opening, text) for opening, text in zip(openings, texts, strict=True) if text.strip()]
    # multiple_choice asks for two options; the second one is not looked at
    questions = [Question(opening, (text, " the"), 0) for opening, text in pairs]
    values = []
    for (opening, text), (value, _) in zip(pairs, multiple_choice(judge, questions).log_likelihoods, strict=True):
        tokens = len(encode(judge.tokenizer, opening + text)) - len(encode(judge.tokenizer, opening))
        values.append(math.exp(-value / tokens))
    return values + [math.inf] * (len(texts) - len(pairs))


def _trigram_ratio(samples: Sequence[str], true: Sequence[str]) -> float:
    """The mean share of distinct trigrams in the samples, divided by that in the true texts; pairs below three words
    have no trigram and are left out."""
    sample_shares, true_shares = [], []
    for sample, text in zip(samples, true, strict=True):
        words = min(_word_count([sample]), _word_count([text]))
        if words >= 3:
            sample_shares.append(_distinct_trigrams([sample], words))
            true_shares.append(_distinct_trigrams([text], words))
    return fmean(sample_shares) / fmean(true_shares)


def _pooled_trigram_ratio(samples: Sequence[str], true: Sequence[str]) -> float:
    words = min(_word_count(samples), _word_count(true))
    return _distinct_trigrams(samples, words) / _distinct_trigrams(true, words)


def _word_count(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _question(kind: str, first: str, second: str) -> str:
    return f"Which is {kind}, {_with_article(first)} or {_with_article(second)}?"


def _answer(noun: str, kind: str) -> str:
    article = _with_article(noun)
    return f"{article[0].upper()}{article[1:]} is {kind}."


def _share(successes: Sequence[bool]) -> Interval:
    return stats.proportion(successes.count(True), len(successes))
