"""Numbers: what is not finite stops where it arises, intervals at the ends have a width, sizes have limits."""

import copy
import math
from dataclasses import replace

import pytest

from helpers import base, evaluation, figures, generation, speed
from helpers.base import Interval
from helpers.evaluation import Comparison, Item
from helpers.evaluation.likelihood import _MultipleChoice, _Perplexity
from helpers.figures import memory_by_precision
from helpers.generation import Decoding, Reply, Sampling
from helpers.machine import Devices, Training, Workload, estimate, hardware_claims, place, published_config, shard
from helpers.models import Budget
from helpers.runs import recording
from helpers.speed import SpeedSettings
from helpers.speed.benchmark import _Spread

from .judge import Fault, refused, same

NAN, INF = math.nan, math.inf
GREEDY = Sampling(temperature=0, max_new_tokens=3)
TEXT = "Once upon a time"


def changed(loaded, path, value, at=(0, 0)):
    """The model with one number of one weight changed."""
    model = copy.deepcopy(loaded.model)
    model.get_parameter(path).data[at[: model.get_parameter(path).dim()]] = value
    return replace(loaded, model=model)


ASK = {
    "generate": lambda model: generation.generate(model, TEXT, GREEDY),
    "chat": lambda model: generation.Chat(model, sampling=GREEDY).ask("Hello?"),
    "lookup": lambda model: generation.generate(model, TEXT, GREEDY, decoding=Decoding("lookup")),
    "compare": lambda model: evaluation.compare(["Hello?"], {"a": model}, GREEDY),
    "perplexity": lambda model: evaluation.perplexity(model, [TEXT, "The end."]),
    "choice": lambda model: evaluation.multiple_choice(model, [evaluation.Question(TEXT, (" there", " a"), 0)]),
    "candidates": lambda model: generation.next_token_probabilities(model, TEXT),
}


@pytest.mark.parametrize("ask", ASK.values(), ids=[f"B1-{name}" for name in ASK])
@pytest.mark.parametrize(
    ("path", "value", "layer"),
    [
        ("transformer.h.0.self_attention.query_key_value.weight", NAN, "transformer.h.0.self_attention"),
        ("transformer.h.1.ln_mlp.bias", INF, "transformer.h.1.ln_mlp"),
        ("transformer.ln_f.weight", NAN, "transformer.ln_f"),
    ],
    ids=["attention", "norm", "last-norm"],
)
def test_a_weight_that_is_not_finite_is_named(tiny_loaded, ask, path, value, layer):
    refused(lambda: ask(changed(tiny_loaded, path, value)), "not finite", f"first in {layer}")


def reply(text="", tokens=1, reason="end"):
    return Reply(text, tokens, 0.1, 0.1, reason)


def said(*rows):
    """Two sides' replies to as many questions with the key "goat"."""
    items = tuple(Item(str(number), "fact", "?", ("goat",)) for number in range(len(rows)))
    replies = {side: tuple(reply(row[index]) for row in rows) for index, side in enumerate(("a", "b"))}
    return Comparison(items, replies, {"a": "A", "b": "B"}, {"a": 1, "b": 1})


def wide(interval):
    """Judge that an interval over a dozen items is not certain of anything."""
    if not interval.low <= interval.estimate <= interval.high or interval.high - interval.low < 0.1:
        raise Fault("wrong", f"{interval} is too sure")


@pytest.mark.parametrize(
    "interval",
    [
        lambda: said(*[("goat", "goat")] * 12).difference("a", "b").interval,
        lambda: said(*[("", "")] * 12).difference("a", "b").interval,
        lambda: said(*[("goat", "")] * 12).difference("a", "b").interval,
        lambda: said(*[("", "goat")] * 12).difference("a", "b").interval,
        lambda: said(*[("goat", "")] * 11, ("", "")).difference("a", "b").interval,
        lambda: said(("goat", ""), *[("goat", "goat")] * 11).difference("a", "b").interval,
        lambda: said(*[("goat", "")] * 12).win_rate(),
        lambda: said(*[("", "")] * 12).win_rate(),
        lambda: said(*[("goat", "")] * 12).score("a"),
        lambda: said(*[("goat", "")] * 12).score("b"),
        lambda: base.mean([1.0] * 12),
        lambda: base.mean([0] * 12),
        lambda: base.proportion(0, 12),
        lambda: base.proportion(12, 12),
        lambda: base.paired_difference([1.0] * 12, [0.0] * 12, [1] * 12),
    ],
    ids=[
        "B3-same-right", "B3-same-wrong", "B3-all-first", "B3-all-second", "B3-eleven", "B3-one", "B3-all-won",
        "B3-all-tied", "B3-all-right", "B3-none-right", "B3-mean-1", "B3-mean-0", "B3-none", "B3-all", "B3-weights",
    ],
)  # fmt: skip
def test_an_interval_at_the_end_has_a_width(interval):
    wide(interval())


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["B1-nan", "B1-inf", "B1-minus-inf"])
def test_a_number_that_is_not_finite_is_refused(bad):
    for ask in (
        lambda: base.mean([1.0, 2.0, bad]),
        lambda: base.ratio([1.0, bad], [1.0, 1.0]),
        lambda: base.paired_difference([bad, 1.0], [1.0, 1.0]),
        lambda: Interval(bad, 0.0, 1.0),
        lambda: _Perplexity(2, 2, (1.0, bad), (1, 1), (1, 1), ("a", "b")).bits_per_byte,
        lambda: _MultipleChoice(((-1.0, bad), (bad, -1.0)), (0, 0)).accuracy,
        lambda: recording.record("a value", bad),
        lambda: _Spread.of([1.0, bad]),
        lambda: figures.token_times([0.1, bad], "x"),
        lambda: figures.cache_growth({"heads": bad}, 2048, "x"),
    ):
        refused(ask)


@pytest.mark.parametrize("text", ["", " "], ids=["B4-nothing", "B4-blank"])
def test_a_model_that_answers_nothing_has_no_speed_and_says_so(text):
    table = said(*[(text, "goat")] * 3).speed()
    missing = base.known(table.loc["a", "tokens/s"], "none: no reply has a second token", 3)
    same(missing, "none: no reply has a second token")
    recording.record("a_speed", missing)  # a run keeps it
    same(said(*[(text, "goat")] * 3).score("a").estimate, 0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Workload(batch_size=-1),
        lambda: Workload(batch_size=0),
        lambda: Workload(context_tokens=-2048),
        lambda: Workload(batch_size=NAN),
        lambda: Workload(context_tokens=INF),
        lambda: Workload(batch_size=1.5),
        lambda: estimate(published_config("tiiuae/falcon-7b"), "bf16", mode="lora", training=Training(rank=-8)),
        lambda: place(published_config("tiiuae/falcon-7b"), "bf16", [-80e9]),
        lambda: place(published_config("tiiuae/falcon-7b"), "bf16", [NAN]),
        lambda: shard(published_config("tiiuae/falcon-7b"), "bf16", [INF], mode="full"),
        lambda: shard(published_config("tiiuae/falcon-7b"), "bf16", [], mode="full"),
        lambda: Devices((), NAN),
    ],
    ids=[
        "B8-batch", "B8-no-batch", "B8-context", "B8-nan", "B8-inf", "B8-half", "B8-rank", "B8-gpu", "B8-gpu-nan",
        "B8-gpu-inf", "B8-no-gpu", "B8-host",
    ],
)  # fmt: skip
def test_a_size_out_of_range_is_refused(ask):
    refused(ask)


@pytest.mark.parametrize("value", [NAN, INF, -1.0], ids=["B8-temperature-nan", "B8-temperature-inf", "B8-cold"])
def test_a_temperature_is_a_number(tiny_loaded, value):
    refused(lambda: generation.generate(tiny_loaded, TEXT, Sampling(temperature=value)), "temperature")
    refused(lambda: generation.next_token_probabilities(tiny_loaded, TEXT, temperature=value), "temperature")


@pytest.mark.parametrize("seconds", [0, -1, NAN, INF], ids=["B8-0", "B8-negative", "B8-nan-s", "B8-inf-s"])
def test_a_budget_is_a_time(seconds):
    refused(lambda: Budget(seconds, 60.0), "above 0", error=ValueError)
    refused(lambda: Budget(60.0, seconds), "above 0", error=ValueError)


@pytest.mark.parametrize("bandwidth", [0.0, -1e9, NAN, INF], ids=["B9-0", "B9-negative", "B9-nan", "B9-inf"])
def test_a_bandwidth_that_cannot_be_is_refused(tiny_loaded, bandwidth):
    refused(lambda: speed.measure(tiny_loaded, [1], SpeedSettings(bandwidth=bandwidth)), "bandwidth")


@pytest.mark.parametrize(
    "names",
    [("loss a", "loss-a", "loss_a"), ("ä", "ö", "é"), ("A", "a"), ("a.png", "a/png"), ("x" * 200, "x" * 201)],
    ids=["B6-spaces", "B6-accents", "B6-case", "B6-slash", "B6-long"],
)
def test_every_figure_has_its_own_file(names):
    same(len({recording._file_part(name).casefold() for name in names}), len(names))


@pytest.mark.parametrize("nats", [1e3, 1e300], ids=["B1-1e3", "B1-1e300"])
def test_a_loss_too_large_for_a_perplexity_is_said(nats):
    refused(lambda: _Perplexity(2, 2, (nats, nats), (1, 1), (1, 1), ("a", "b")).perplexity, "too much for a perplexity")


def test_b7_the_articles_machines_hold_what_they_were_used_for():
    table = hardware_claims().set_index("claim")
    for claim, size in (("A13", 80), ("A14", 80), ("A15", 80), ("A16", 80), ("A17", 40)):
        held = size * table.loc[claim, f"least {size} GB GPUs"]
        if not held <= table.loc[claim, "published GB"]:
            raise Fault("wrong", f"{claim} needs {held} GB")


def test_b1_a_figure_of_memory_takes_what_an_estimate_gives():
    config = published_config("tiiuae/falcon-7b")
    same(len(memory_by_precision([estimate(config, "bf16")], {"one": 80e9}, "x").axes), 1)
