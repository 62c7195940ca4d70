"""Win rates by kind by hand, and a real small model as the judge, compared with its own logits."""

import dataclasses

import pytest
import torch

from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.evaluation import Comparison, Item, judge, read_items, win_rates
from helpers.evaluation.judging import JUDGE_PROMPT, _Judged, _Pair
from helpers.generation import Reply
from helpers.models import load_profile, loading

pytestmark = pytest.mark.usefixtures("one_thread")
FACT = Item("1", "fact", "the capital of France?", ("Paris",), ("Rome",))
STORY = Item("2", "story", "a story?")
LINES = read_items(ROOT / "notebooks/data/comparison_prompts.jsonl")


def comparison(*rows: tuple[Item, str, str]) -> Comparison:
    """A comparison of two sides from an item and both texts each."""
    items = tuple(dataclasses.replace(item, id=str(number)) for number, (item, _, _) in enumerate(rows))
    replies = {
        "falcon": tuple(Reply(first, 3, 1.0, 0.5, "end") for _, first, _ in rows),
        "llama": tuple(Reply(second, 3, 1.0, 0.5, "end") for _, _, second in rows),
    }
    models = {"falcon": "falcon-mini", "llama": "SmolLM2"}
    return Comparison(items, replies, models, dict.fromkeys(replies, 2**20), models)


# --- win rates --------------------------------------------------------------------------------------------------------


def test_win_rates_by_kind_by_hand():
    number = next(item for item in LINES if item.id == "arithmetic-1")
    test = comparison(
        *[(FACT, "Paris", "Rome")] * 3,
        (FACT, "Rome", "Paris"),
        (FACT, "Paris", "Paris"),
        (FACT, "Rome", "Rome"),
        (number, "5", "It is 5."),
        (number, "6", "7"),
        (STORY, "a", "b"),
    )
    table = win_rates(test).set_index(["kind", "by"])
    assert list(table.index) == [("fact", "key"), ("arithmetic", "key"), ("all", "key")]
    columns = ["prompts", "falcon-mini better", "SmolLM2 better", "tied", "rate"]
    assert table.loc[("fact", "key"), columns].tolist() == [6, 3, 1, 2, (3 + 2 / 2) / 6]
    assert table.loc[("arithmetic", "key"), columns].tolist() == [2, 0, 0, 2, 0.5]
    assert table.loc[("all", "key"), columns].tolist() == [8, 3, 1, 4, 5 / 8]
    # All tied: at most the share that Clopper and Pearson leave for two trials without a success, (1 - p)² = 0.025.
    most = (1 - 0.025**0.5) / 2
    assert table.loc[("arithmetic", "key"), ["low", "high"]].tolist() == pytest.approx([0.5 - most, 0.5 + most])
    for low, rate, high in table[["low", "rate", "high"]].to_numpy():
        assert 0 <= low < rate < high <= 1


def test_the_interval_is_the_score_interval_of_the_difference():
    """Tango 1998, of 5 and 1 among 12: each end is a difference whose score is 1.96, found here on a fine grid."""
    test = comparison(*[(FACT, "Paris", "Rome")] * 5, (FACT, "Rome", "Paris"), *[(FACT, "Paris", "Paris")] * 6)
    row = win_rates(test).iloc[0]
    n, b, c = 12, 5, 1
    inside = []
    for step in range(-999, 1000):
        d = step / 1000
        linear = -b - c + (2 * n - b + c) * d
        share = ((linear**2 + 8 * n * c * d * (1 - d)) ** 0.5 - linear) / (4 * n)
        if abs(b - c - n * d) <= 1.959964 * (n * (2 * share + d * (1 - d))) ** 0.5:
            inside.append(d)
    assert (row.low, row.high) == pytest.approx(((1 + inside[0]) / 2, (1 + inside[-1]) / 2), abs=1e-3)


def test_one_prompt_of_a_kind_says_nothing():
    row = win_rates(comparison((FACT, "Paris", "Rome"))).iloc[0]
    assert (row.rate, row.low, row.high) == (1, 0, 1)


def test_the_judge_decides_only_what_has_no_key_and_a_contradiction_is_a_tie():
    test = comparison((FACT, "Paris", "Rome"), (FACT, "Paris", "Rome"), *[(STORY, "a", "b")] * 3)
    fact, _, *stories = test.items
    pairs = [
        _Pair(fact, ("llama", "llama"), "llama", "falcon"),
        _Pair(stories[0], ("falcon", "falcon"), "falcon", None),
        _Pair(stories[1], ("falcon", "falcon"), "falcon", None),
        _Pair(stories[2], ("falcon", "llama"), None, None),
    ]
    table = win_rates(test, _Judged("SmolLM2", ("falcon", "llama"), tuple(pairs))).set_index(["kind", "by"])
    assert table.loc[("story", "judge"), "rate"] == pytest.approx(2.5 / 3)
    assert table.loc[("fact", "key"), "rate"] == 1
    assert table.loc[("all", "key"), "prompts"] == 2
    assert table.index[-1] == ("all", "key")


# --- what a judge is worth --------------------------------------------------------------------------------------------


def judged(*pairs: tuple[str, str, str | None]) -> _Judged:
    """Verdicts as letters: what was chosen in the given order and in the other, and which side is right."""
    made = [_Pair(FACT if right else STORY, (given, swapped), given, right) for given, swapped, right in pairs]
    return _Judged("SmolLM2", ("f", "l"), tuple(made))


def test_a_judge_that_only_looks_at_the_place():
    """Its first choice is always the reply shown first: f in the given order, l in the other."""
    found = judged(*[("f", "l", "l")] * 10, *[("f", "l", None)] * 4)
    assert found.agreement.estimate == 0
    assert found.first_place == 1
    assert found.tested == (0, 0, 10)
    assert not found.better_than_a_coin
    assert "the same verdict in both orders for 0 of 14 pairs" in found.summary()
    assert "shown first in 100% of its verdicts" in found.summary()
    assert "does not show it to be better than a coin" in found.summary()


def test_a_judge_that_knows_and_one_that_contradicts_the_keys():
    knows = judged(*[("l", "l", "l")] * 9, *[("f", "f", "f")] * 3, ("l", "f", "l"), ("f", "f", None))
    assert knows.agreement.estimate == 13 / 14
    assert knows.first_place == pytest.approx((9 + 3 + 0 + 1) / 28)
    assert knows.tested == (12, 0, 1)
    assert knows.better_than_a_coin
    assert "better than a coin, so its verdicts" in knows.summary()
    assert "leans to the right reply in 13" in knows.summary()
    against = judged(*[("l", "l", "f")] * 12)
    assert against.tested == (0, 12, 0)
    assert not against.better_than_a_coin
    # 4 of 6 has an interval from 0.30 to 0.90, so it shows nothing.
    assert not judged(*[("l", "l", "l")] * 4, *[("l", "l", "f")] * 2).better_than_a_coin


@pytest.fixture(scope="module")
def falcon_mini():
    return loading.load(load_profile("laptop").falcon_chat, "fp32")


def test_a_real_judge_prefers_what_its_own_logits_say(falcon_mini):
    rows = [
        (FACT, "Paris", "Rome"),
        (FACT, "Paris", "Paris."),
        (STORY, "A bird sang.", "no"),
        (STORY, "same", "same"),
        (FACT, "Rome", "It is Paris."),
    ]
    test = comparison(*rows)
    found = judge(test, falcon_mini, precision="fp32")
    # Both right, and both the same, are not asked.
    assert [pair.item.id for pair in found.pairs] == ["0", "2", "4"]
    assert [pair.right for pair in found.pairs] == ["falcon", None, "llama"]
    assert found.judge == falcon_mini.ref.name
    for pair in found.pairs:
        item, first, second = rows[int(pair.item.id)]
        given = _log_odds(falcon_mini, item.question, first, second)
        swapped = _log_odds(falcon_mini, item.question, second, first)
        assert pair.chosen == ("falcon" if given > 0 else "llama", "llama" if swapped > 0 else "falcon")
        assert pair.leans == ("falcon" if given > swapped else "llama")


def _log_odds(loaded, question, first, second) -> float:
    """ln p("1") - ln p("2") of the judge's reply, from transformers' own forward pass."""
    content = JUDGE_PROMPT.format(question=question, first=first, second=second)
    prompt = loaded.format.render([{"role": "user", "content": content}])
    ends = []
    for option in ("1", "2"):
        ids = torch.tensor([loaded.tokenizer(f"{prompt} {option}")["input_ids"]])
        start = len(loaded.tokenizer(prompt)["input_ids"])
        with torch.inference_mode():
            logits = loaded.model(ids).logits[0, start - 1 : -1].float()
        ends.append(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum().item())
    return ends[0] - ends[1]


def test_the_tested_pairs_are_spread_over_the_kinds(falcon_mini):
    rows = [(dataclasses.replace(FACT, kind=kind), "Paris", "Rome") for kind in "abcdefgh"]
    found = judge(comparison(*rows), falcon_mini, tested=4, precision="fp32")
    assert [pair.item.kind for pair in found.pairs] == ["a", "c", "e", "g"]


def test_long_replies_are_cut_to_fit_a_context_of_2048_tokens(falcon_mini):
    from helpers.evaluation.judging import _question

    longest = _question(dataclasses.replace(STORY, question="why " * 5000), ["word " * 5000, "more " * 5000])
    # Its vocabulary of 4,096 makes more tokens of a text than those of the large models do.
    assert 500 < len(falcon_mini.tokenizer(longest.prompt[0]["content"])["input_ids"]) < 1900


def test_nothing_to_judge_is_said(falcon_mini):
    with pytest.raises(WorkbookError, match="nothing to judge"):
        judge(comparison((FACT, "Paris", "Paris")), falcon_mini)
    alone = comparison((FACT, "Paris", "Rome"))
    alone = dataclasses.replace(alone, replies={"falcon": alone.replies["falcon"]})
    with pytest.raises(WorkbookError, match="only one"):
        judge(alone, falcon_mini)
