"""Two results on the same items: by hand, against scipy, and the harness' results against our own."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.evaluation import Question, evaluate, multiple_choice, perplexity
from helpers.evaluation.options import _MultipleChoice
from helpers.evaluation.pairs import _paired

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["Once upon a time there was a falcon.", "The bird sat in a tree and sang.", "é🦅 A fox came by.", "Snow fell."]
RIGHT, WRONG = (-1.0, -2.0), (-2.0, -1.0)


def choices(*correct: bool) -> _MultipleChoice:
    return _MultipleChoice(tuple(RIGHT if each else WRONG for each in correct), (0,) * len(correct))


@pytest.fixture(scope="module")
def noisy_loaded(tiny_loaded):
    """The tiny model with noise on its weights, as a rounding would leave it."""
    model = copy.deepcopy(tiny_loaded.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (each for each in model.transformer.h.parameters() if each.ndim > 1):
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    return replace(tiny_loaded, model=model)


def test_accuracies_by_hand_and_against_scipy():
    first = [True] * 30 + [False] * 6 + [True] * 9 + [False] * 5
    second = [True] * 30 + [True] * 6 + [False] * 9 + [False] * 5
    found = _paired(choices(*first), choices(*second))
    assert (found.measure, found.count, found.first, found.second) == ("accuracy", 50, 0.78, 0.72)
    assert (found.only_first, found.only_second) == (9, 6)
    assert found.p_value == pytest.approx(2 * sum(math.comb(15, k) for k in range(7)) / 2**15)
    assert found.difference.estimate == pytest.approx(3 / 50)
    theirs = scipy.stats.bootstrap(
        (np.array(first, float), np.array(second, float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True, n_resamples=50_000, batch=500, method="percentile", rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert (found.difference.low, found.difference.high) == pytest.approx((theirs.low, theirs.high), abs=0.021)
    assert not found.detected
    turned = _paired(choices(*second), choices(*first))
    assert (turned.only_first, turned.only_second, turned.p_value) == (6, 9, found.p_value)
    assert turned.difference.low == pytest.approx(-found.difference.high)


def test_answers_that_never_differ_still_leave_a_width():
    found = _paired(choices(*[True] * 99, False), choices(*[True] * 99, False))
    most = 1 - 0.025 ** (1 / 100)
    assert (found.difference.estimate, found.p_value) == (0, 1)
    assert (found.difference.low, found.difference.high) == pytest.approx((-most, most))
    assert not found.detected


def test_a_great_difference_is_detected():
    found = _paired(choices(*[True] * 40), choices(*[True] * 20, *[False] * 20))
    assert found.detected
    assert found.difference.low > 0.3
    assert found.p_value == pytest.approx(2 / 2**20)


def test_losses_of_texts_are_weighed_by_their_bytes(tiny_loaded, noisy_loaded):
    one, other = (perplexity(loaded, TEXTS) for loaded in (tiny_loaded, noisy_loaded))
    found = _paired(other, one)
    assert (found.measure, found.count, found.p_value, found.only_first) == ("bits per byte", 4, None, None)
    assert (found.first, found.second) == pytest.approx((other.bits_per_byte, one.bits_per_byte))
    assert found.difference.estimate == pytest.approx(other.bits_per_byte - one.bits_per_byte)
    sizes = np.array([len(text.encode()) for text in TEXTS])
    change = (np.array(other.nll) - np.array(one.nll)) / math.log(2)
    draws = np.random.default_rng(3).integers(0, 4, (200_000, 4))
    by_hand = np.quantile(change[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
    width = by_hand[1] - by_hand[0]
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(by_hand), abs=0.05 * width)


def test_the_harness_and_multiple_choice_give_the_same_pair(tiny_loaded, noisy_loaded):
    lines = (ROOT / "notebooks/data/short_facts.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    questions = [
        Question(item["text"], tuple(f" {option}" for option in item["options"]), item["answer"])
        for item in map(json.loads, lines)
    ]
    ours = _paired(*(multiple_choice(loaded, questions) for loaded in (tiny_loaded, noisy_loaded)))
    results = [evaluate(loaded, ["short_facts", "story_endings"], 60) for loaded in (tiny_loaded, noisy_loaded)]
    theirs = _paired(*results, task="short_facts")
    assert theirs == replace(ours, measure="acc")
    assert ours.only_first + ours.only_second > 0
    both = _paired(*results)
    assert both.count == 120
    story = _paired(*results, task="story_endings")
    assert both.only_first == theirs.only_first + story.only_first
    normed = _paired(*results, task="story_endings", metric="acc_norm")
    values = [np.array(result.items["story_endings"].values["acc_norm"]) for result in results]
    assert normed.difference.estimate == pytest.approx((values[0] - values[1]).mean())


def test_a_measure_between_right_and_wrong_has_no_mcnemar(tiny_loaded, noisy_loaded):
    results = [evaluate(loaded, ["short_facts"], 8) for loaded in (tiny_loaded, noisy_loaded)]
    for shift, result in enumerate(results):
        scores = result.items["short_facts"]
        scores.values["f1"] = tuple((place + shift) / 10 for place in range(8))
    found = _paired(*results, metric="f1")
    assert (found.measure, found.p_value, found.only_first) == ("f1", None, None)
    assert found.difference.estimate == pytest.approx(-0.1)
    assert found.detected


def test_what_cannot_be_compared_is_refused(tiny_loaded):
    texts, turned = perplexity(tiny_loaded, TEXTS), perplexity(tiny_loaded, TEXTS[::-1])
    question = Question("She sat on a", (" chair", " cloud"), 0)
    asked = [multiple_choice(tiny_loaded, [question, replace(question, prompt=p)]) for p in ("A", "B")]
    facts = evaluate(tiny_loaded, ["short_facts"], 4)
    for first, second, options, message in (
        (texts, turned, {}, "not of the same items"),
        (*asked, {}, "not of the same items"),
        (facts, evaluate(tiny_loaded, ["short_facts"], 5), {}, "not of the same items"),
        (facts, texts, {}, "acc, the other of bits per byte"),
        (texts, texts, {"task": "short_facts"}, "for results of evaluate"),
        (facts, facts, {"task": "mmlu"}, "no task 'mmlu'. Choose one of: short_facts"),
        (facts, facts, {"metric": "f1"}, "no metric 'f1'"),
    ):
        with pytest.raises(WorkbookError, match=message):
            _paired(first, second, **options)
    with pytest.raises(ValueError, match="two pairs"):
        _paired(choices(True), choices(True))
