"""The measures of falcon-mini's quality, against hand-computed values and transformers' own loss."""

import math
from collections import Counter
from statistics import fmean, median

import pytest
import torch

from helpers.base.files import ROOT
from helpers.evaluation.options import _MultipleChoice
from helpers.generation import Reply
from helpers.models import Loaded, load, load_profile
from helpers.training.miniature import quality
from helpers.training.miniature.texts import END, _read_nouns, _read_texts
from helpers.training.miniature.training import HELD_OUT

pytestmark = pytest.mark.usefixtures("one_thread")
STORIES = _read_texts(ROOT / "env/models/falcon-mini" / HELD_OUT)


@pytest.fixture(scope="module")
def base() -> Loaded:
    return load(load_profile("laptop").falcon, "fp32")


def nll(loaded: Loaded, before: str, text: str) -> float:
    """transformers' own loss of ``text`` after ``before``, summed over its tokens."""
    first, both = (loaded.tokenizer(part, return_tensors="pt")["input_ids"] for part in (before, before + text))
    labels = both.clone()
    labels[:, : first.shape[1]] = -100
    with torch.inference_mode():
        return float(loaded.model(both, labels=labels).loss) * (both.shape[1] - first.shape[1])


def tokens(loaded: Loaded, before: str, text: str) -> int:
    return len(loaded.tokenizer(before + text)["input_ids"]) - len(loaded.tokenizer(before)["input_ids"])


def reply(text: str, finish_reason: str = "end") -> Reply:
    return Reply(text, 1, 1.0, 1.0, finish_reason)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He ran home. He sat down.", False),
        ("He ran home. She slept. he ran  home!", True),
        ("No. No. No.", False),  # a single word may come again
        ('"Come here," he said. Come here he said', True),
        ("I see\nI see", True),
        ("A dog ran. A dog sat.", False),
        ("", False),
    ],
)
def test_a_sentence_said_twice_is_found(text, found):
    assert quality._repeats_a_sentence(text) is found


def test_distinct_trigrams_by_hand():
    # a b c a b c: abc bca cab abc, three of four; of the first five words abc bca cab
    assert quality._distinct_trigrams(["a b c a b c"], 6) == 3 / 4
    assert quality._distinct_trigrams(["a b c a b c"], 5) == 1
    # no trigram runs from one text into the next, and words are counted over all texts
    assert quality._distinct_trigrams(["a b c", "a b c", "x y z"], 6) == 1 / 2
    with pytest.raises(ValueError, match="three words"):
        quality._distinct_trigrams(["a b"], 9)


def test_shares_of_chat_replies_by_hand():
    texts = [reply("Hi."), reply("It is. It is.", "stop"), reply("Go User: on", "length"), reply("a b")]
    talk = quality._ChatReplies(("?",) * 4, tuple(texts))
    shares = (talk.ended, talk.speaking_for_the_user, talk.repeating)
    assert [share.estimate for share in shares] == [0.75, 0.5, 0.25]  # cut at a stop string: the user's line


def test_noun_pairs_are_an_animal_and_another_thing_each_about_equally_often():
    kinds = {row["noun"]: row["kind"] for row in _read_nouns()}
    pairs = quality._noun_pairs(50)
    assert len(pairs) == 50
    assert len(set(pairs)) == 50
    assert all((kinds[a] == "animal") and (kinds[t] != "animal") for a, t in pairs)
    assert max(Counter(noun for pair in pairs for noun in pair).values()) <= 2
    assert pairs == quality._noun_pairs(50) != quality._noun_pairs(50, seed=1)
    assert len(set(quality._noun_pairs(300))) == 300
    with pytest.raises(ValueError, match="1296 pairs, not 2000"):
        quality._noun_pairs(2000)


def test_two_choices_ask_each_pair_in_both_orders_and_a_taste_gains_nothing(base, monkeypatch):
    def answers(loaded, prompts, sampling, seeds):
        """Always the first of the two, and for "a thing" both."""
        texts = [prompt[0]["content"] for prompt in prompts]
        first = [text.split(", ")[1].split(" or ")[0] for text in texts]
        return [reply(text if "a thing" in text else f"{name}.") for text, name in zip(texts, first, strict=True)]

    def likes_animals(loaded, questions):
        """Finds the animal likelier whatever is asked."""
        animals = {row["noun"] for row in _read_nouns() if row["kind"] == "animal"}
        scores = [tuple(float(text.split()[1] in animals) for text in question.options) for question in questions]
        return _MultipleChoice(tuple(scores), tuple(question.answer for question in questions))

    monkeypatch.setattr(quality, "generate_batch", answers)
    monkeypatch.setattr(quality, "multiple_choice", likes_animals)
    found = quality._two_choices(base, 20)
    assert len(set(found.questions)) == 20
    nouns = [question.removeprefix("Which is an animal, ").rstrip("?").split(" or ") for question in found.questions]
    assert all(one == other[::-1] for one, other in zip(nouns[::2], nouns[1::2], strict=True))
    shares = (found.accuracy, found.control, found.balanced, found.written_balanced)
    # the taste for animals gains nothing over both; the first place is right half of the time, naming both never
    assert [share.estimate for share in shares] == [1, 0, 0.5, 0.25]


def test_the_thread_is_followed_where_the_gain_of_the_true_text_is_the_larger(base, monkeypatch):
    """By likelihood alone the second pair would be right and the first wrong; by gain it is the other way round."""
    asked = []
    tables = [((-9.0, -8.0), (-5.0, -9.0), (-7.0, -7.0)), ((-20.0, -9.0), (-5.5, -10.0), (-8.0, -9.0))]

    def choose(loaded, questions):
        asked.append(questions)
        return _MultipleChoice(tables[len(asked) - 1], (0, 0, 0))

    monkeypatch.setattr(quality, "multiple_choice", choose)
    stories = [" ".join(f"{name}{n}" for n in range(90)) for name in "abc"]
    assert quality._follows_the_thread(base, [*stories, "too short"]).estimate == pytest.approx(1 / 3)
    after, alone = asked
    assert after[0].prompt == END + " ".join(f"a{n}" for n in range(60))
    assert after[0].options == tuple("".join(f" {name}{n}" for n in range(60, 85)) for name in "ab")
    assert after[2].options[1] == after[0].options[0]
    assert [question.options for question in alone] == [question.options for question in after]
    assert {question.prompt for question in alone} == {END}


def test_fluency_is_the_ratio_of_medians_and_the_mean_over_rounds(base, monkeypatch):
    pairs = [pair for story in STORIES[:4] if (pair := quality._opening(base.tokenizer, story))]
    true, seen = {END + opening: text for opening, text in pairs}, []

    def answers(loaded, prompts, sampling, seeds):
        """The true text in the first round; in the second the same three words again and again."""
        first = [seed < len(pairs) for seed in seeds]
        seen.extend(seeds)
        return [reply(true[p] if now else " he ran and" * 9) for p, now in zip(prompts, first, strict=True)]

    monkeypatch.setattr(quality, "generate_batch", answers)
    found = quality._fluency(base, base, STORIES[:4])
    assert seen == list(range(2 * len(pairs)))
    one = quality._fluency(base, base, STORIES[:4], rounds=1)
    assert (one.perplexity_ratio, one.trigram_ratio, one.pooled_trigram_ratio) == (pytest.approx(1),) * 3
    texts = [math.exp(nll(base, o, t) / tokens(base, o, t)) for o, t in pairs]
    poor = [math.exp(nll(base, o, " he ran and" * 9) / tokens(base, o, " he ran and" * 9)) for o, _ in pairs]
    assert found.perplexity_ratio == pytest.approx(median(texts + poor) / median(texts), rel=1e-3)
    words = 27 * len(pairs)
    true_share = quality._distinct_trigrams([text for _, text in pairs], words)
    assert found.pooled_trigram_ratio == pytest.approx((1 + 3 / (25 * len(pairs)) / true_share) / 2)
    whole, cut = (fmean(quality._distinct_trigrams([t], most) for _, t in pairs) for most in (10**6, 27))
    assert found.trigram_ratio == pytest.approx((whole + 3 / 25) / (whole + cut))


def test_an_empty_sample_is_infinitely_perplexing(base):
    assert quality._perplexities(base, ["Once upon", "Once upon"], [" ", " a time"])[-1] == math.inf


def test_the_judges_perplexity_is_the_exponential_of_transformers_own_loss(base):
    opening, true = quality._opening(base.tokenizer, STORIES[0])
    for text, value in zip(
        (" He was sad.", true), quality._perplexities(base, [opening] * 2, [" He was sad.", true]), strict=True
    ):
        assert value == pytest.approx(math.exp(nll(base, opening, text) / tokens(base, opening, text)), rel=1e-3)


def test_stories_too_short_to_be_continued_are_refused(base):
    with pytest.raises(ValueError, match="120 tokens"):
        quality._fluency(base, base, ["Once upon a time."])
    with pytest.raises(ValueError, match="85 words"):
        quality._follows_the_thread(base, ["Once upon a time."])
