"""Own answers to every exercise, right and wrong, as readers write them: right in another form, or told what is off."""

import math
import re
from collections import Counter
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from scipy.stats import binomtest
from torch import nn
from transformers import TopPLogitsWarper

from helpers import evaluation, exercises, machine
from helpers.base.files import ROOT
from helpers.exercises import checking

RIGHT = None


class Row(NamedTuple):
    """An answer to an exercise; ``said`` is in the verdict of a wrong one. Some are made by a fixture."""

    exercise: str
    what: str
    answer: object
    said: str | None = RIGHT


def loop(step, start):
    """A function that repeats ``step(model, ids)`` ``count`` times from ``start(ids)`` on."""

    def decode(model, ids, count):
        row = start(ids)
        for _ in range(count):
            row = step(model, row)
        return row

    return decode


def most_likely(model, row):
    """Appends the most likely token to a list of ids."""
    return [*row, model(torch.tensor([row])).logits[0, -1].argmax().item()]


def least_likely(model, row):
    return [*row, model(torch.tensor([row])).logits[0, -1].argmin().item()]


def first_position(model, row):
    return [*row, model(torch.tensor([row])).logits[0, 0].argmax().item()]


def warped(probabilities, p):
    return TopPLogitsWarper(top_p=p)(None, probabilities.log()[None]).softmax(-1)[0].numpy()


def top_p_without_the_last(probabilities, p):
    values, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[order[values.cumsum(0) < p]] = values[values.cumsum(0) < p]
    return kept / kept.sum().clamp_min(1e-9)


def top_p_not_renormalised(probabilities, p):
    values, order = probabilities.sort(descending=True)
    chosen = order[(values.cumsum(0) - values) < p]
    return torch.where(torch.isin(torch.arange(len(values)), chosen), probabilities, 0.0)


def count_by_walking(model):
    """Right: without modules(), and as a tensor."""
    counts = torch.zeros(2, dtype=torch.long)
    for child in model.children():
        counts += count_by_walking(child)
        if isinstance(child, nn.Linear):
            counts += torch.tensor([int(isinstance(child, Linear4bit | Linear8bitLt)), 1])
    return counts


def count_exact_types(model):
    quantized = sum(isinstance(m, Linear4bit | Linear8bitLt) for m in model.modules())
    return quantized, quantized + sum(type(m) is nn.Linear for m in model.modules())


def nf4_in_numpy(packed, scales, code):
    packed, scales, code = packed.numpy().ravel(), scales.numpy(), code.numpy()
    indices = np.column_stack([packed // 16, packed % 16]).ravel()
    return code[indices] * np.repeat(scales, 64)


def nf4_swapped(packed, scales, code):
    indices = torch.stack([packed.flatten() & 15, packed.flatten() >> 4], 1)
    return (code[indices.long()].view(-1, 64) * scales[:, None]).flatten()


def nf4_without_scales(packed, scales, code):
    return code[torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).long()].flatten()


def format_by_joining(message, history, system_prompt):
    lines = [f"System: {system_prompt}"] if system_prompt else []
    for pair in history:
        lines += map(": ".join, zip(("User", "Falcon"), pair, strict=True))
    return "\n".join([*lines, f"User: {message}", "Falcon:"])


def words(turns, question):
    return len(" ".join([question, *(text for turn in turns for text in turn)]).split())


def trim_from_the_end(history, question, limit):
    """Right: it grows the kept part, and returns lists instead of tuples."""
    kept = []
    for turn in reversed(history):
        if words([turn, *kept], question) > limit:
            break
        kept.insert(0, turn)
    return [list(turn) for turn in kept]


def trim_with_a_hole(history, question, limit):
    kept = []
    for turn in reversed(history):
        if words([turn, *kept], question) <= limit:
            kept.insert(0, turn)
    return kept


def trim_without_the_question(history, question, limit):
    while history and words(history, "") > limit:
        history = history[1:]
    return history


def trim_the_newest(history, question, limit):
    while history and words(history, question) > limit:
        history = history[:-1]
    return history


def wilson_by_scipy(passed, n):
    interval = binomtest(passed, n).proportion_ci(method="wilson")
    return np.array([interval.low, interval.high])


def wald(passed, n):
    p, z = passed / n, NormalDist().inv_cdf(0.975)
    half = z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


def labels_in_place(ids, prompt):
    ids[:prompt] = [-100] * prompt
    return ids


def labels_of_tensors(ids, prompt):
    labels = torch.tensor(ids)
    labels[:prompt] = -100
    return labels


def whole_words(text):
    return set(re.findall(r"\w+", text.lower()))


def key_by_sets(text, answer, others):
    """Right: as 0 or 1, by sets."""
    return int({*answer} <= whole_words(text)) * int(not {*others} & whole_words(text))


def key_by_the_helper(text, answer, others):
    """Right: the helper also counts plurals, as an answer may."""
    return evaluation.is_correct(ITEM("id", "kind", "question", tuple(answer), tuple(others)), text)


def key_in_parts_of_words(text, answer, others):
    return all(w in text.lower() for w in answer) and not any(w in text.lower() for w in others)


def key_with_any_word(text, answer, others):
    return any(w in whole_words(text) for w in answer) and not any(w in whole_words(text) for w in others)


def p_value_doubled(a, b):
    return 2 * sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)


def yes_no(noun, answer, end=" Answer yes or no."):
    others = ("no",) if answer == "yes" else ("yes",)
    return {"id": "mine", "kind": "yes_no", "question": f"Is a {noun} an animal?{end}"} | {
        "answer": (answer,), "others": others,
    }  # fmt: skip


DAYS = 6 * 178_557_088_768 * 3.5e12 / (4096 * 0.4 * 312e12) / 86_400
CONTEXT = (640e9 - machine.weight_bytes(machine.published_config("tiiuae/falcon-180B"), "bf16")) / 4_751_360
EIGHT = [f"transformer.h.{layer}.self_attention.dense" for layer in range(8)]
ITEM = evaluation.Item
PEDRO = "My name is Pedro, I live in"  # the article's; falcon-mini goes on repeating itself
PIZZA = {"user": "Do you like {}?", "reply": "I love {}.", "question": "Why?", "words": ("pizza", "music")}
GOOD_CHOICE = [
    "transformer.h.0.self_attention.dense", "transformer.h.0.self_attention.query_key_value",
    "transformer.h.7.mlp.dense_h_to_4h", "transformer.h.4.mlp.dense_h_to_4h",
]  # fmt: skip
LARGEST_ERRORS = [f"transformer.h.{layer}.mlp.dense_4h_to_h" for layer in (1, 7, 6, 2)]  # of their weights

ROWS = [
    Row("00-1", "a tensor", lambda *sizes: 2 * torch.tensor(sizes).prod()),
    Row("00-1", "values alone", lambda layers, heads, size, b: layers * heads * size * b, "not right"),
    Row("00-1", "KiB", lambda *sizes: 2 * math.prod(sizes) / 1024, "in KiB"),
    Row("00-1", "the sum", lambda *sizes: 2 * sum(sizes), "not right"),
    Row("00-2", "a numpy number", np.float32(DAYS)),
    Row("00-2", "the separate head counted", DAYS * 179_522_565_120 / 178_557_088_768),
    Row("00-2", "hours", DAYS * 24, "in hours"),
    Row("00-2", "at the full peak", DAYS * 0.4, "full peak"),
    Row("00-2", "one GPU", DAYS * 4096, "single GPU"),
    Row("00-2", "a text", f"{DAYS:.0f} days", "Expected a number"),
    Row("00-3", "a whole number", int(CONTEXT)),
    Row("00-3", "a tensor of one", torch.tensor([CONTEXT])),
    Row("00-3", "no weights", 640e9 / 4_751_360, "weights"),
    Row("00-3", "8 heads", CONTEXT * 29, "8 heads"),
    Row("00-3", "GB of 2**30", CONTEXT * 1.17, "80e9"),
    Row("00-4", "by name", {"gpus": 3, "gigabytes": 80}),
    Row("00-4", "bytes", [3, 80e9]),
    Row("00-4", "the sum of the bytes, divided", (9, 24), "do not hold it"),
    Row("00-4", "a larger one", (2, 141), "not the least"),
    Row("00-4", "the wrong way round", (80, 3), "number of GPUs first"),
    Row("00-4", "a card of no catalogue", (1, 193), "not among them"),
    Row("01-1", "a tensor", lambda c: torch.tensor(8 / (9 + (1 + 2 * c.num_kv_heads / c.num_attention_heads)))),
    Row("01-1", "percent", lambda c: 800 / (10 + 2 * c.num_kv_heads / c.num_attention_heads), "in percent"),
    Row("01-1", "as if all heads had keys", lambda _config: Fraction(2, 3), "not right"),
    Row("01-1", "the attention's", lambda c: 1 - 8 / (10 + 2 * c.num_kv_heads / c.num_attention_heads), "attention"),
    Row("01-2", "a list of one row", loop(most_likely, lambda ids: ids[0].tolist())),
    Row("01-2", "a batch as lists", lambda m, ids, n: [loop(most_likely, lambda i: i[0].tolist())(m, ids, n)]),
    Row("01-2", "new ids alone", lambda m, ids, n: loop(most_likely, lambda i: i[0].tolist())(m, ids, n)[3:], "alone"),
    Row("01-2", "the least likely", loop(least_likely, lambda ids: ids[0].tolist()), "New token 1 of 1"),
    Row("01-2", "the first position", loop(first_position, lambda ids: ids[0].tolist()), "New token"),
    Row("01-2", "one only", lambda model, ids, _n: most_likely(model, ids[0].tolist()), "adds 1 ids"),
    Row("01-3", "an array", warped),
    Row("01-3", "a list", lambda probabilities, p: warped(probabilities, p).tolist()),
    Row("01-3", "below p only", top_p_without_the_last, "too few"),
    Row("01-3", "not renormalised", top_p_not_renormalised, "sums to"),
    Row("01-3", "a threshold", lambda probabilities, p: probabilities * (probabilities > 1 - p), "too"),
    Row("01-3", "the kept ones alone", lambda probabilities, p: warped(probabilities, p)[:5], "shape"),
    Row("01-4", "both repeat", [PEDRO, "One two three one two three one two three one two"], "saves too many"),
    Row("01-4", "a list", [PEDRO, "a b a b a b a b a b a b"]),
    Row("01-4", "swapped", ("a b a b a b a b a b a b", "He said yes. She said yes. He said"), "first prompt does not"),
    Row("01-4", "one prompt", "Once upon a time", "Expected a list"),
    Row("02-1", "a tensor", lambda rows, columns: torch.tensor(rows * columns, dtype=torch.float64) * 0.5625),
    Row("02-1", "no scales", lambda rows, columns: rows * columns / 2, "indices"),
    Row("02-1", "bits", lambda rows, columns: rows * columns * 4.5, "in bits"),
    Row("02-1", "scales of 16 bits", lambda rows, columns: rows * columns / 2 + rows * columns / 32, "not right"),
    Row("02-2", "a tensor", count_by_walking),
    Row("02-2", "exactly nn.Linear", count_exact_types, "subclass of nn.Linear"),
    Row("02-2", "only the outer ones", lambda m: (0, sum(isinstance(c, nn.Linear) for c in m)), "quantized of"),
    Row("02-2", "all modules", lambda m: (0, len(list(m.modules())) - 1), "quantized of"),
    Row("02-2", "the wrong way round", lambda m: tuple(reversed(count_by_walking(m).tolist())), "first"),
    Row("02-3", "numpy", nf4_in_numpy),
    Row("02-3", "blocks as rows", lambda *given: torch.tensor(nf4_in_numpy(*given)).view(-1, 64)),
    Row("02-3", "lower bits first", nf4_swapped, "order"),
    Row("02-3", "no scales", nf4_without_scales, "scales"),
    Row("02-3", "one index a byte", lambda packed, _scales, code: code[packed.flatten().long() & 15], "indices"),
    Row("02-4", "a tuple", tuple(GOOD_CHOICE)),
    Row("02-4", "the largest errors of weights", LARGEST_ERRORS, "random choices of four did better"),
    Row("02-4", "eight", EIGHT, "Name 4"),
    Row("02-4", "layers", [0, 1, 2, 3], "Expected a text"),
    Row("02-4", "a name with a typo", ["transformer.h.0.mlp", *GOOD_CHOICE[1:]], "is not a quantized matrix"),
    Row("03-1", "joined", format_by_joining),
    Row("03-1", "no history", lambda m, _h, s: format_by_joining(m, [], s), "1 turns of history"),
    Row("03-1", "a space at the end", lambda *given: format_by_joining(*given) + " ", "goes on with ' '"),
    Row("03-1", "an empty system line", lambda m, h, s: format_by_joining(m, h, s or " "), "no system prompt"),
    Row("03-1", "no tag at the end", lambda *given: format_by_joining(*given)[:-8], "too early"),
    Row("03-2", "from the end, as lists", trim_from_the_end),
    Row("03-2", "a hole in the middle", trim_with_a_hole, "not the last ones"),
    Row("03-2", "the question not counted", trim_without_the_question, "more words than the limit"),
    Row("03-2", "the newest dropped", trim_the_newest, "not the last ones"),
    Row("03-2", "the last two", lambda history, _question, _limit: history[-2:], "limit of 20: "),
    Row("03-2", "nothing kept", lambda _history, _question, _limit: [], "drops more turns"),
    Row("03-3", "a pattern", lambda text, stops: re.split("|".join(map(re.escape, stops)), text)[0]),
    Row("03-3", "the first stop string only", lambda text, stops: text.split(stops[0])[0], "too little"),
    Row("03-3", "the last occurrence", lambda text, stops: text.rsplit(stops[0], 1)[0], "too little"),
    Row("03-3", "one letter too many", lambda text, stops: text[: text.find(stops[0])], "too much"),
    Row("03-4", "in order", ["Do you like {}?", "I love {}.", "Why?", ["cake", "music"]]),
    Row("03-4", "a word that it ignores", PIZZA | {"words": ("dog", "pizza")}, "does not name 'dog'"),
    Row("03-4", "the word in the question", PIZZA | {"question": "Why pizza?"}, "must not hold 'pizza'"),
    Row("03-4", "no gap", PIZZA | {"user": "Hello.", "reply": "Hi."}, "gap"),
    Row("03-4", "an empty word", PIZZA | {"words": ("pizza", "")}, "neither is part"),
    Row("04-1", "plurals too", key_by_the_helper),
    Row("04-1", "0 and 1", key_by_sets),
    Row("04-1", "parts of words", key_in_parts_of_words, "scapegoat"),
    Row("04-1", "any word", key_with_any_word, "'Goat'"),
    Row("04-1", "yes as a text", lambda _text, _words, _others: "yes", "True or False"),
    Row("04-2", "an array by scipy", wilson_by_scipy),
    Row("04-2", "the simple interval", wald, "simple interval"),
    Row("04-2", "upper end first", lambda passed, n: wilson_by_scipy(passed, n)[::-1], "lower end first"),
    Row("04-2", "percent", lambda passed, n: 100 * wilson_by_scipy(passed, n), "in percent"),
    Row("04-2", "one number", lambda passed, n: [passed / n], "Expected 2 numbers"),
    Row("04-3", "by scipy", lambda a, b: np.float64(binomtest(a, a + b).pvalue)),
    Row("04-3", "one direction", lambda a, b: binomtest(min(a, b), a + b, alternative="less").pvalue, "one direction"),
    Row("04-3", "more than 1", p_value_doubled, "more than 1"),
    Row("04-3", "percent", lambda a, b: 100 * binomtest(a, a + b).pvalue, "in percent"),
    Row("04-4", "a mapping", yes_no("kitten", "yes")),
    Row("04-4", "one that is answered", ITEM(**yes_no("teapot", "no")), "do not both fail"),
    Row("04-4", "an outlandish key", yes_no("kitten", "quokka"), "does not offer"),
    Row("04-4", "no answer", ITEM(**yes_no("kitten", "yes", end="")), "Neither chose"),
    Row("04-4", "half a key", yes_no("kitten", "yes") | {"others": ()}, "both parts"),
    Row("04-4", "an item of the test", "old item", "already"),
    Row("05-1", "a float", lambda inputs, outputs, rank: float(rank) * inputs + rank * outputs),
    Row("05-1", "the whole matrix", lambda inputs, outputs, _rank: inputs * outputs, "whole matrix"),
    Row("05-1", "one of the two", lambda inputs, _outputs, rank: inputs * rank, "not what peft trains"),
    Row("05-2", "a tensor", labels_of_tensors),
    Row("05-2", "a tuple", lambda ids, prompt: (*[-100] * prompt, *ids[prompt:])),
    Row("05-2", "in place", labels_in_place, "changes the ids"),
    Row("05-2", "the reply hidden", lambda ids, _prompt: [-100] * len(ids), "reply"),
    Row("05-2", "the reply alone", lambda ids, prompt: ids[prompt:], "not one label for each"),
    Row("05-2", "nothing hidden", lambda ids, _prompt: ids, "the prompt would count"),
    Row("05-3", "an array", lambda w, a, b, alpha, rank: w.numpy() + alpha / rank * b.numpy() @ a.numpy()),
    Row("05-3", "a parameter", lambda w, a, b, alpha, rank: nn.Parameter(torch.addmm(w, b, a, alpha=alpha / rank))),
    Row("05-3", "no scale", lambda w, a, b, _alpha, _rank: w + b @ a, "right size"),
    Row("05-3", "no weight", lambda _w, a, b, alpha, rank: alpha / rank * b @ a, "without the weight"),
    Row("05-3", "in place", lambda w, a, b, alpha, rank: w.add_(alpha / rank * b @ a), "changes the weight"),
    Row("05-3", "the wrong order", lambda w, a, b, _alpha, _rank: w + (a.T @ b.T), "raised RuntimeError"),
    Row("05-4", "measured by the solution, in other types", "measured"),
    Row("05-4", "invented", "invented", "does not have the loss"),
    Row("05-4", "no evidence", (1, {1: 1.5}), "little evidence"),
    Row("05-4", "against its own evidence", (1, {1: 2.5, 8: 1.5, 32: 1.4}), "above rank 32"),
    Row("05-4", "not the smallest", (32, {1: 1.45, 8: 1.41, 32: 1.4}), "a smaller rank"),
    Row("05-4", "a rank alone", 16, "mapping"),
]  # fmt: skip


@pytest.fixture
def answer_of(request):
    def of(row):
        if row.answer == "old item":
            return evaluation.read_items(ROOT / "notebooks" / "data" / "animal_items.jsonl")[0]
        if row.answer in ("measured", "invented"):
            rank, losses = request.getfixturevalue("measured_choice")
            off = 1.0 if row.answer == "invented" else 0.0
            return [torch.tensor(rank), {one: np.float64(loss + off) for one, loss in losses.items()}]
        return row.answer

    return of


def cases():
    for row in ROWS:
        marks = [pytest.mark.slow] if isinstance(row.answer, str) and row.exercise == "05-4" else []
        yield pytest.param(row, id=f"{row.exercise} {row.what}", marks=marks)


@pytest.mark.parametrize("row", cases())
def test_an_own_answer_is_right_or_told_what_is_off(row, answer_of, measured_on):
    verdict = exercises.check(row.exercise, answer_of(row), **measured_on(row.exercise))
    assert verdict.started
    assert verdict.right == (row.said is RIGHT), verdict
    if row.said is not RIGHT:
        assert row.said in verdict.text
        assert "raised" in row.said or "raised" not in verdict.text
        assert "stand-in" not in verdict.text


def test_each_exercise_has_a_right_answer_in_another_form_and_two_wrong_ones():
    assert {row.exercise for row in ROWS} == set(checking._EXERCISES)
    count = Counter((row.exercise, row.said is RIGHT) for row in ROWS)
    for exercise in checking._EXERCISES:
        assert count[exercise, True] >= 1, exercise
        assert count[exercise, False] >= 2, exercise
    assert len(ROWS) >= 60
