"""falcon-mini is worth shipping: bounds on the card's figures, and a cheap part of `workbook evaluate-mini`."""

import json

import pytest

from helpers.base.files import ROOT
from helpers.evaluation import perplexity
from helpers.models import load, load_profile
from helpers.training.miniature import quality
from helpers.training.miniature.texts import _read_texts
from helpers.training.miniature.training import HELD_OUT

pytestmark = pytest.mark.usefixtures("one_thread")
BASE, CHAT = (ROOT / "env/models" / name for name in ("falcon-mini", "falcon-mini-chat"))
FIGURES = json.loads((BASE / "quality.json").read_text(encoding="utf-8"))


def test_the_cards_figures_are_within_their_bounds():
    assert FIGURES["parameters_outside_embedding"] >= 5e6
    assert FIGURES["stories"] == 150
    assert FIGURES["bits_per_byte"] <= 1.0
    assert FIGURES["continuations"] == 200
    assert FIGURES["perplexity_ratio"] <= 1.4
    assert FIGURES["trigram_ratio"] >= 0.92
    assert FIGURES["thread"][0] >= 0.95
    assert (FIGURES["messages"], FIGURES["choices"]) == (100, 100)
    assert FIGURES["ended"][0] >= 0.95
    assert FIGURES["speaking_for_the_user"][0] == 0
    assert FIGURES["repeating"][0] <= 0.05
    assert FIGURES["choice_accuracy"][0] >= 0.6
    assert 0.6 <= FIGURES["choice_balanced"][0] < 1


def test_the_held_out_loss_and_the_thread_of_some_stories():
    base, stories = load(load_profile("laptop").falcon, "fp32"), _read_texts(BASE / HELD_OUT)[:40]
    assert perplexity(base, stories).bits_per_byte == pytest.approx(FIGURES["bits_per_byte"], abs=0.05)
    assert quality._follows_the_thread(base, stories).estimate >= 0.85


def test_chat_replies_end_and_name_the_animal_that_was_asked_about():
    chat, messages = load(load_profile("laptop").falcon_chat, "fp32"), _read_texts(CHAT / HELD_OUT)[::5]
    talk = quality._chat_replies(chat, messages)
    assert talk.ended.estimate >= 0.9
    assert talk.speaking_for_the_user.estimate == 0
    assert talk.repeating.estimate <= 0.1
    choices = quality._two_choices(chat)
    assert choices.accuracy.estimate == pytest.approx(FIGURES["choice_accuracy"][0], abs=0.02)
    assert choices.control.estimate == pytest.approx(FIGURES["choice_control"][0], abs=0.02)
    assert choices.written_balanced.estimate == pytest.approx(FIGURES["written_balanced"][0], abs=0.02)
