"""A study of precisions: differences, verdicts and recorded values by hand; a real one on falcon-mini."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.base import GIB, Interval
from helpers.evaluation import evaluate, measure_precisions, perplexity
from helpers.evaluation.harness import _Evaluation, _ItemScores
from helpers.evaluation.likelihood import _Perplexity
from helpers.evaluation.precisions import _almost_none, _PrecisionResult, _PrecisionStudy
from helpers.models import LoadReport, ModelRef, load, load_profile, unload
from helpers.speed import Benchmark, SpeedSettings
from helpers.speed.benchmark import _SpeedRow, _Spread

pytestmark = pytest.mark.usefixtures("one_thread")
REF = ModelRef("tests/mini", "falcon", "plain", stand_in_for="tiiuae/falcon-180B")
LABEL = "mini (stand-in for tiiuae/falcon-180B)"
TEXTS, ITEMS = 40, 200
BYTES, TOKENS = 300, 100  # of each text
LN2 = math.log(2)
MISSING = "needs 3.0 GiB more than 1 device of 8.0 GiB can hold"


def result(precision: str, *, extra_bits: float = 0.0, wrong: int = 0, moved: float = 0.0) -> _PrecisionResult:
    """A model whose loss is ``extra_bits`` per byte above that of the others, with the first ``wrong`` items wrong."""
    stored, quantized = {"bf16": (2 * GIB, 0), "int8": (GIB, 8), "nf4": (GIB // 2, 8)}.get(precision, (4 * GIB, 0))
    report = LoadReport(
        model=REF.id, stand_in_for=REF.stand_in_for, precision=precision, parameters=1, stored_bytes=stored,
        linear_layers=8, quantized_layers=quantized, dtypes={}, devices={}, seconds=0.0, repaired=False,
    )  # fmt: skip
    # Texts are of unlike difficulty, the same in every precision: pairs know the difference far better than texts.
    nll = tuple((0.5 + number / TEXTS + extra_bits) * BYTES * LN2 for number in range(TEXTS))
    keys = tuple(f"text {number}" for number in range(TEXTS))
    text = _Perplexity(TOKENS * TEXTS, BYTES * TEXTS, nll, (TOKENS,) * TEXTS, (BYTES,) * TEXTS, keys)
    scores = tuple(float(number >= wrong) for number in range(ITEMS))
    items = {"facts": _ItemScores(tuple(f"item {number}" for number in range(ITEMS)), {"acc": scores})}
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + torch.tensor([[moved, -moved], [moved, -moved]])
    return _PrecisionResult(report, logits, text, _Evaluation((), {}, "0", items))


def speeds(**medians: float) -> Benchmark:
    rows = []
    for precision, median in medians.items():
        row = _SpeedRow(LABEL, precision, 1, 8, 4, 3, GIB, GIB, 1e9, decode=_Spread(median, median - 1, median + 1))
        rows += [row, replace(row, batch_size=4, decode=_Spread(1.0, 1.0, 1.0))]
    return Benchmark(tuple(rows), True)


def study(
    *results: _PrecisionResult, missing: tuple[str, ...] = (), measured: Benchmark | None = None
) -> _PrecisionStudy:
    by_precision = {each.report.precision: each for each in results}
    shortfalls = dict.fromkeys(missing, MISSING)
    return _PrecisionStudy(REF, (*missing, *by_precision), by_precision, shortfalls, measured or Benchmark((), True))


# The verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.019, 0.019, True),
        (0.001, 0.002, True),
        (-0.019, 0.021, None),
        (0.019, 0.021, None),
        (-1, 1, None),
        (0.021, 0.03, False),
        (-0.03, -0.021, False),
        (0.0, 0.02, None),
    ],
)
def test_almost_none_takes_the_whole_interval_within_the_margin(low, high, verdict):
    assert _almost_none(Interval((low + high) / 2, low, high), 0.02) is verdict


@pytest.mark.parametrize(
    ("int8", "nf4", "expected"),
    [
        # none of 200 items differs: Clopper and Pearson leave less than 4 / 200 = 2 points, within 5
        ({}, {"extra_bits": 0.01}, {"text": (True, True), "tasks": (True, True)}),
        # 3 bits per hundred bytes are beyond 2, and refute the claim for nf4 alone
        ({}, {"extra_bits": 0.03}, {"text": (True, False), "tasks": (True, True)}),
        # 12 of 200 items: 6 points, with an interval that reaches to both sides of 5, so nobody can agree any more
        ({}, {"wrong": 12}, {"text": (None, None), "tasks": (None, None)}),
        # what cannot tell leaves a refutation standing
        ({"extra_bits": 0.03}, {"wrong": 12}, {"text": (False, None), "tasks": (None, None)}),
        # 40 of 200 items: 20 points, all of the interval beyond 5
        ({}, {"wrong": 40}, {"text": (True, True), "tasks": (True, False)}),
    ],
)
def test_the_verdict_on_the_claim_of_almost_no_difference(int8, nf4, expected):
    found = study(result("bf16"), result("int8", **int8), result("nf4", **nf4)).verdicts()
    assert found == {
        (measure, precision): verdict
        for measure, verdicts in expected.items()
        for precision, verdict in zip(("int8", "nf4"), verdicts, strict=True)
    }


def test_full_precision_has_no_verdict_and_without_bf16_nobody_has():
    assert study(result("bf16"), result("fp32")).verdicts() == {}
    alone = study(result("int8"), result("nf4"), missing=("bf16",))
    assert (alone.pairs, alone.verdicts(), alone.logit_distances(), alone.quality_rows()) == ({}, {}, {}, [])
    assert alone.change_values("falcon", "A18") == {}
    assert alone.changes().empty


# Values to record


def test_changes_are_recorded_in_nats_per_token_and_as_shares_by_hand():
    found = study(result("bf16"), result("int8"), result("nf4", extra_bits=0.01, wrong=2)).change_values(
        "falcon", "A18"
    )
    assert list(found) == [
        "falcon_nll_change_int8", "falcon_nll_change_nf4", "falcon_accuracy_change_int8", "falcon_accuracy_change_nf4",
    ]  # fmt: skip
    nats = found["falcon_nll_change_nf4"]
    assert nats.value == pytest.approx(0.01 * LN2 * BYTES / TOKENS, abs=5e-5)  # 0.01 bits on each of 3 bytes a token
    assert (nats.unit, nats.tolerance, nats.claim, nats.model, nats.agrees) == ("nats/token", 0.005, "A18", LABEL, True)
    share = found["falcon_accuracy_change_nf4"]
    assert (share.value, share.unit, share.tolerance, share.agrees) == (-0.01, "", 0.03, True)


def test_changes_without_a_claim_are_recorded_without_a_verdict():
    found = study(result("bf16"), result("nf4", extra_bits=0.03)).change_values("llama")
    assert {(value.claim, value.agrees) for value in found.values()} == {(None, None)}
    assert list(found) == ["llama_nll_change_nf4", "llama_accuracy_change_nf4"]


def test_losses_are_recorded_for_every_precision_by_hand():
    found = study(result("bf16"), result("nf4", extra_bits=0.01)).text_values()
    bits = sum(0.5 + number / TEXTS for number in range(TEXTS)) / TEXTS + 0.01
    assert list(found) == ["perplexity_bf16", "bits_per_byte_bf16", "perplexity_nf4", "bits_per_byte_nf4"]
    assert found["bits_per_byte_nf4"].value == pytest.approx(bits, abs=5e-5)
    assert found["bits_per_byte_nf4"].unit == "bits/byte"
    assert found["perplexity_nf4"].value == pytest.approx(2 ** (bits * BYTES / TOKENS), abs=5e-4)


def test_speeds_are_those_of_a_single_reply_and_their_ratio_is_judged():
    for int8, agrees in ((30.0, False), (31.0, True)):
        found = study(result("bf16"), measured=speeds(bf16=50.06, int8=int8, nf4=20.0)).speed_values("A19")
        assert (found["speed_bf16"].value, found["speed_bf16"].unit) == (50.1, "tokens/s")
        ratio = found["int8_over_nf4_speed"]
        assert (ratio.value, ratio.claim, ratio.agrees, ratio.model) == (int8 / 20, "A19", agrees, LABEL)
    assert list(study(measured=speeds(int8=30.0)).speed_values("A19")) == ["speed_int8"]


# Tables and rows of figures


def test_the_table_names_what_is_missing_and_shows_what_was_measured():
    found = study(result("bf16"), result("nf4", moved=0.25), missing=("fp32",)).table()
    assert found.index.tolist() == ["fp32", "bf16", "nf4"]
    assert found.loc["fp32"].tolist() == [MISSING, "", "", "", ""]
    assert found.loc["nf4", ["weights, GiB", "converted", "logits moved"]].tolist() == ["0.500", "8 of 8", "0.2500"]
    assert found.loc["bf16", "logits moved"] == "0.0000"
    # bits per byte of 40 texts of one size: the mean and Student's t over texts, t(0.975, 39) = 2.022691
    bits = 0.5 + np.arange(TEXTS) / TEXTS
    half = 2.022691 * bits.std(ddof=1) / math.sqrt(TEXTS)
    assert (
        found.loc["bf16", "bits per byte"]
        == f"{bits.mean():.3f} ({bits.mean() - half:.3f} to {bits.mean() + half:.3f})"
    )
    alone = study(result("nf4"), missing=("bf16",)).table()
    assert alone.loc["nf4", "logits moved"] == "bf16 does not fit"


def test_the_changes_show_intervals_counts_and_verdicts():
    found = study(result("bf16", wrong=1), result("nf4", extra_bits=0.03)).changes()
    text, tasks = found.loc[("bits per byte, 40 items", "nf4")], found.loc[("acc, 200 items", "nf4")]
    assert (text["change"], text["95% interval"]) == ("+0.0300", "+0.0300 to +0.0300")
    assert (text["McNemar's p"], text["almost none"]) == ("", "no")
    assert (tasks["bf16"], tasks["change"]) == ("0.9950", "+0.0050")
    assert (tasks["only bf16 / only this right"], tasks["McNemar's p"]) == ("0 / 1", "1.00")
    assert tasks["almost none"] == "yes"
    both = study(result("bf16"), result("nf4", wrong=12)).changes()
    assert both["almost none"].tolist() == ["yes", "cannot tell"]


def test_rows_of_figures_by_hand():
    found = study(result("bf16"), result("nf4", extra_bits=0.01), missing=("fp32",), measured=speeds(bf16=9.0))
    assert found.figure_rows() == [
        {"precision": "fp32", "missing": MISSING},
        {
            "precision": "bf16", "missing": None, "stored_bytes": 2 * GIB, "tokens_per_second": 9.0,
            "perplexity": found.results["bf16"].text.perplexity,
        },
        {
            "precision": "nf4", "missing": None, "stored_bytes": GIB // 2, "tokens_per_second": None,
            "perplexity": found.results["nf4"].text.perplexity,
        },
    ]  # fmt: skip
    (row,) = found.quality_rows()
    assert (row["precision"], row["share"]) == ("nf4", 0.25)
    assert (row["change"].low, row["change"].high) == pytest.approx((0.01, 0.01))


# A real model


@pytest.mark.slow
def test_a_study_of_falcon_mini_is_that_of_its_parts():
    profile = load_profile("laptop")
    texts = ["Once upon a time there was a falcon.", "The bird sat in a tree and sang."]
    settings = SpeedSettings(prompt_tokens=4, new_tokens=2, repeats=1, bandwidth=1e9)
    found = measure_precisions(profile.falcon, ["bf16", "nf4"], texts, 4, speed=settings)
    assert (found.precisions, found.shortfalls, found.ref) == (("bf16", "nf4"), {}, profile.falcon)
    assert list(found.results) == ["bf16", "nf4"]
    assert found.results["nf4"].report.quantized_layers == found.results["nf4"].report.linear_layers == 32
    assert {(row.precision, row.new_tokens) for row in found.speeds.rows} == {("bf16", 2), ("nf4", 2)}
    loaded = load(profile.falcon, "bf16")
    measured = found.results["bf16"]
    assert measured.text.nll == pytest.approx(perplexity(loaded, texts).nll)
    assert measured.tasks.items == evaluate(loaded, ["story_endings", "short_facts"], 4).items
    ids = loaded.tokenizer(texts[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(measured.logits, loaded.model(ids).logits[0].float())
    assert found.logit_distances()["nf4"] > 0
    unload(loaded)
