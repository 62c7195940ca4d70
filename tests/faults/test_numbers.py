"""Numbers: what is not finite stops where it arises, intervals at the ends have a width, sizes have limits."""

import copy
import math
from dataclasses import replace

import pytest

from helpers import base, evaluation, figures, generation, speed
from helpers.base import Interval
from helpers.evaluation import Comparison, Item
from helpers.evaluation.likelihood import _Perplexity
from helpers.evaluation.options import _MultipleChoice
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


SMALL = {"uint8": "uint8", "int8": "int8", "float16": "float16", "bool": "bool"}


@pytest.mark.parametrize("kind", SMALL.values(), ids=[f"B3-{name}" for name in SMALL])
def test_numbers_of_numpy_give_the_same_statistics(kind):
    """uint8 is 255 for 0 - 1, and int8 ends at 127, in sums too."""
    import numpy as np

    left, right = [1, 0, 1, 0, 0] * 40, [1, 1, 0, 1, 0] * 40
    one, two = np.array(left, kind), np.array(right, kind)
    same(base.paired_difference(one, two), base.paired_difference(left, right))
    same(base.mean(one), base.mean(left))
    same(base.mcnemar(one, two), base.mcnemar(left, right))
    same(base.ratio(one, two), base.ratio(left, right))
    same(base.proportion(one.sum(), np.int64(len(left))), base.proportion(80, 200))


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 0, 1, 1], [0.5] * 4), ([0.5] * 4, [1, 0, 1, 1]), ([1, 1, 0, 0], [2, 2, 1, 1])],
    ids=["B3-second-is-partial", "B3-first-is-partial", "B3-second-is-a-count"],
)
def test_only_two_lists_of_outcomes_get_the_interval_of_outcomes(first, second):
    """A bootstrap never leaves the range of the differences."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    found = base.paired_difference(first, second)
    same(min(differences) <= found.low <= found.estimate <= found.high <= max(differences), True)


@pytest.mark.parametrize(
    "ask",
    [
        *[lambda c=c: base.proportion(3, 12, c) for c in (95, 0, 1, NAN)],
        *[lambda c=c: base.mean([1.0, 2.0, 4.0], c) for c in (95, 0, 1)],
        *[lambda c=c: base.paired_difference([1, 0, 1], [0, 0, 1], confidence=c) for c in (95, 1)],
        lambda: base.ratio([1.0, 2.0], [1.0, 1.0], 95),
        lambda: base.proportion(2.5, 12),
        lambda: base.proportion(NAN, 12),
        lambda: base.mcnemar([NAN, True], [False, True]),
        lambda: base.paired_difference([1.0, 2.0], [0.0, 0.0], [3.0, -1.0]),
    ],
    ids=[f"B3-{n}" for n in range(14)],
)
def test_an_interval_that_cannot_be_is_refused(ask):
    refused(ask)


@pytest.mark.parametrize(
    "given",
    [
        {"agrees": "no", "claim": "A1"}, {"agrees": NAN, "claim": "A1"}, {"agrees": 0, "claim": "A1"},
        {"tolerance": "0.1"}, {"tolerance": True}, {"unit": 5}, {"claim": 5}, {"model": 5}, {"unit": "\ud800"},
        {"model": "\ud800"}, {"name": "a\ud800"}, {"name": 5}, {"name": "\u200b"},
    ],
    ids=ascii,
)  # fmt: skip
def test_b1_what_is_recorded_beside_a_value_is_of_its_kind(given):
    refused(lambda: recording.record(**{"name": "a value", "value": 1, **given}))


def test_b1_numpy_records_what_it_holds_and_nothing_that_is_masked():
    import numpy as np

    refused(lambda: recording.record("a value", np.ma.masked))
    refused(lambda: recording.record_all([1]), "by name")
    records = recording.record_all({"right": np.bool_(True), "loss": np.float32(0.5)}, tolerance=np.float32(0.25))
    same([(entry.value, entry.content.floor) for entry in records], [(True, None), (0.5, 0.25)])
    entry = recording.record("agreed", 1, claim="A22", agrees=np.bool_(False))
    same(entry.content.agrees, False)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": "0.5"}, {"temperature": None},
        {"temperature": True}, {"top_p": "1"}, {"max_new_tokens": 2.5}, {"max_new_tokens": True},
        {"max_new_tokens": "5"}, {"max_new_tokens": None}, {"seed": 1.5}, {"seed": 2**64}, {"seed": None},
    ],
    ids=lambda given: f"B8-{given}",
)  # fmt: skip
def test_a_sampling_of_odd_values_is_refused(tiny_loaded, given):
    """A temperature of 1e-40 made several logits infinite, and the first token of the vocabulary was drawn."""
    refused(lambda: generation.generate(tiny_loaded, TEXT, Sampling(**given)))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: generation.generate_batch(model, TEXT, GREEDY),
        lambda model: generation.generate_batch(model, [TEXT], GREEDY, stop="abc"),
        lambda model: generation.generate_batch(model, [TEXT], GREEDY, stop=["a", ""]),
        lambda model: generation.generate_batch(model, [TEXT], GREEDY, [1.5]),
        lambda model: generation.generate(model, TEXT, GREEDY, decoding=Decoding("lokup")),
        lambda model: generation.generate(model, TEXT, GREEDY, decoding=Decoding("lookup", candidates=1.5)),
        *[lambda model, k=k: generation.next_token_probabilities(model, TEXT, k) for k in (0, 10**7, 2.0)],
        lambda model: generation.next_token_probabilities(model, TEXT, temperature=1e-40),
        lambda model: evaluation.perplexity(model, [TEXT], window=16.5),
        lambda model: evaluation.perplexity(model, [TEXT], max_tokens=True),
        lambda model: evaluation.perplexity(model, [5]),
        lambda model: evaluation.compare([TEXT], {"a": model}, batch_size=1.5),
        *[
            lambda model, q=q: evaluation.multiple_choice(model, [evaluation.Question(TEXT, *q)])
            for q in [("bc", 0), ((" b", " b"), 1), ((" b", " c"), True), ((" b", " c"), 1.0), ((" b", 5), 0)]
        ],
    ],
    ids=[f"B8-{n}" for n in range(19)],
)
def test_what_would_be_taken_for_something_else_is_refused(tiny_loaded, ask):
    refused(lambda: ask(tiny_loaded))


def test_b8_numbers_of_numpy_are_numbers(tiny_loaded, tmp_path):
    import numpy as np

    plain = Sampling(0.5, 1.0, 3, 7)
    odd = Sampling(np.float64(0.5), np.float32(1), np.int64(3), np.uint8(7))
    same(odd, plain)
    (reply,) = generation.generate_batch(tiny_loaded, [TEXT], odd, np.array([7]))
    same(reply.token_ids, generation.generate(tiny_loaded, TEXT, plain).token_ids)
    generation.Chat(tiny_loaded, sampling=odd).save(tmp_path / "chat.json")
    same(generation.Chat.load(tmp_path / "chat.json", tiny_loaded).sampling, plain)
    given = [evaluation.Question(TEXT, (" b", " c"), answer) for answer in (1, np.int64(1))]
    same(*[evaluation.multiple_choice(tiny_loaded, [question]) for question in given])


@pytest.mark.parametrize("draft_is_bad", [True, False], ids=["B1-draft", "B1-model"])
def test_a_speculative_reply_is_refused_if_either_model_gives_nan(tiny_loaded, draft_is_bad):
    bad = changed(tiny_loaded, "transformer.h.1.ln_mlp.bias", NAN)
    model, draft = (tiny_loaded, bad) if draft_is_bad else (bad, tiny_loaded)
    decoding = Decoding("speculative", draft=draft)
    refused(lambda: generation.generate(model, TEXT, GREEDY, decoding=decoding), "not finite", "h.1.ln_mlp")
    refused(lambda: list(generation.stream(model, TEXT, GREEDY, decoding=decoding)), "not finite")
