"""Perplexity and multiple choice against log_softmax by hand, transformers' own loss and lm-evaluation-harness."""

import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.evaluation import MultipleChoice, Question, evaluate, multiple_choice, perplexity, windows
from helpers.prompts import format_for
from helpers.stats import proportion
from helpers.types import ROOT, WorkbookError

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "Once upon a time there was a falcon.",
    "é🦅",
    "A second, longer text: " + "the bird sat in a tree and sang. " * 6,
]


def token_nlls(loaded, text: str, context: int = 10**9) -> list[float]:
    """-ln p of each token of the text after the begin token, from one forward for each, in float64."""
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text)["input_ids"]]
    found = []
    with torch.no_grad():
        for i in range(1, len(ids)):
            logits = loaded.model(torch.tensor([ids[max(0, i - context) : i]])).logits[0, -1].double()
            found.append(-float(logits.log_softmax(-1)[ids[i]]))
    return found


def test_equals_log_softmax_by_hand(tiny_loaded):
    measured = perplexity(tiny_loaded, TEXTS)
    by_hand = [token_nlls(tiny_loaded, text) for text in TEXTS]
    assert measured.nll == pytest.approx([sum(values) for values in by_hand], rel=1e-5)
    assert measured.text_tokens == tuple(len(values) for values in by_hand)
    every_token = [value for values in by_hand for value in values]
    assert measured.perplexity == pytest.approx(math.exp(sum(every_token) / len(every_token)), rel=1e-4)
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert (measured.tokens, measured.bytes) == (len(every_token), size)
    assert measured.bits_per_byte == pytest.approx(sum(every_token) / math.log(2) / size, rel=1e-5)


def test_equals_the_loss_of_transformers(tiny_loaded):
    ids = torch.tensor([[0, *tiny_loaded.tokenizer(TEXTS[0])["input_ids"]]])
    with torch.no_grad():
        loss = float(tiny_loaded.model(input_ids=ids, labels=ids).loss)
    assert perplexity(tiny_loaded, TEXTS[:1]).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_uniform_model_has_the_vocabularys_size_as_perplexity(tiny_loaded):
    model = copy.deepcopy(tiny_loaded.model)
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(replace(tiny_loaded, model=model), TEXTS)
    assert measured.perplexity == pytest.approx(len(tiny_loaded.tokenizer), rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(measured.tokens * 12 / measured.bytes, rel=1e-5)  # 4096 = 2**12


def test_long_texts_are_scored_in_windows_of_the_context(tiny_loaded):
    text = "The falcon flew over the hill and the river. " * 35
    ids = [0, *tiny_loaded.tokenizer(text, verbose=False)["input_ids"]]
    assert len(ids) > 2 * 128
    expected = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids), 64):
            first = 1 if begin == 0 else begin + 64
            for position in range(first, min(begin + 128, len(ids))):
                logits = tiny_loaded.model(torch.tensor([ids[begin:position]])).logits[0, -1].double()
                expected -= float(logits.log_softmax(-1)[ids[position]])
    assert perplexity(tiny_loaded, [text]).nll[0] == pytest.approx(expected, rel=1e-5)


@given(length=st.integers(2, 300), context=st.integers(2, 64))
def test_windows_score_every_position_once_with_enough_before_it(length, context):
    found = windows(length, context)
    assert [p for _, scored, end in found for p in range(scored, end)] == list(range(1, length))
    for begin, scored, end in found:
        assert 0 <= begin < scored < end <= length
        assert end - begin <= context
        assert scored - begin >= min(scored, context // 2)


def test_max_tokens_limits_the_tokens_of_all_texts(tiny_loaded):
    tokenizer = tiny_loaded.tokenizer
    sizes = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    exact = perplexity(tiny_loaded, TEXTS, max_tokens=sizes[0])
    assert exact == perplexity(tiny_loaded, TEXTS[:1])
    limit = sizes[0] + sizes[1] + 10
    cut = perplexity(tiny_loaded, TEXTS, max_tokens=limit)
    kept = tokenizer.decode(tokenizer(TEXTS[2])["input_ids"][:10])
    assert cut.tokens == limit
    assert cut == perplexity(tiny_loaded, [*TEXTS[:2], kept])
    assert perplexity(tiny_loaded, TEXTS, max_tokens=10**6) == perplexity(tiny_loaded, TEXTS)


def test_a_cut_inside_a_character_counts_its_bytes(tiny_loaded):
    assert len(tiny_loaded.tokenizer("🦅")["input_ids"]) > 1
    assert perplexity(tiny_loaded, ["🦅a"], max_tokens=1).bytes == 4


@pytest.mark.parametrize("texts", [[], [""], ["a", ""], "a text alone"])
def test_nothing_to_score_is_refused(tiny_loaded, texts):
    with pytest.raises(WorkbookError, match="list of texts"):
        perplexity(tiny_loaded, texts)


def test_impossible_limits_and_tokenizers_are_refused(tiny_loaded):
    with pytest.raises(WorkbookError, match="max_tokens"):
        perplexity(tiny_loaded, TEXTS, max_tokens=0)
    bare = copy.deepcopy(tiny_loaded.tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(WorkbookError, match="neither a begin nor an end token"):
        perplexity(replace(tiny_loaded, tokenizer=bare), TEXTS)
    bare.eos_token = "<|endoftext|>"
    assert perplexity(replace(tiny_loaded, tokenizer=bare), TEXTS) == perplexity(tiny_loaded, TEXTS)


QUESTIONS = (
    Question("Once upon a time there was a", (" falcon.", " very old and very slow camel.", " big tree"), 1),
    Question("A prompt that ends with a break:\n", ("goat", "saddle"), 0),
    Question([{"role": "user", "content": "Is a goat an animal?"}], ("yes", "no, not at all", "é🦅"), 2),
    Question("No", (" 12 birds", "thing else"), 1),
)


def texts_of(loaded, question: Question) -> list[tuple[str, str]]:
    """The text before each option, without the white space at its end, and the text that is scored."""
    if isinstance(question.prompt, str):
        prompt, start = question.prompt, ""
    else:
        (message,) = question.prompt
        prompt, start = f"User: {message['content']}\nFalcon:", " "
    kept = prompt.rstrip()
    return [(kept, prompt[len(kept) :] + start + option) for option in question.options]


def by_hand(loaded, before: str, option: str) -> float:
    """ln p of the option's tokens, from one forward over the single unpadded sequence, in float64."""
    length = len(loaded.tokenizer(before)["input_ids"])
    ids = torch.tensor(loaded.tokenizer(before + option)["input_ids"])
    with torch.no_grad():
        logs = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(length, len(ids)))


def animal_questions(limit: int | None = None) -> list[Question]:
    """The items of the task animal_choice, its options in alphabetical order."""
    lines = (ROOT / "notebooks/data/animal_items.jsonl").read_text(encoding="utf-8").splitlines()
    items = [item for item in map(json.loads, lines) if item["kind"] == "choice"][:limit]
    options = [tuple(sorted(item["answer"] + item["others"])) for item in items]
    return [
        Question([{"role": "user", "content": item["question"]}], names, names.index(item["answer"][0]))
        for item, names in zip(items, options, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_multiple_choice_equals_log_softmax_over_single_sequences(tiny_loaded, batch_size):
    measured = multiple_choice(tiny_loaded, QUESTIONS, batch_size=batch_size)
    for question, values in zip(QUESTIONS, measured.log_likelihoods, strict=True):
        expected = [by_hand(tiny_loaded, before, option) for before, option in texts_of(tiny_loaded, question)]
        assert values == pytest.approx(expected, abs=1e-4)
    assert measured.answers == (1, 0, 2, 1)


def test_multiple_choice_chooses_the_likeliest_and_counts():
    measured = MultipleChoice(((-3.0, -1.0), (-1.0, -2.0), (-5.0, -7.0), (-4.0, -4.0), (-9.0, -8.0)), (1, 0, 1, 0, 0))
    assert measured.chosen == (1, 0, 0, 0, 1)
    assert measured.correct == (True, True, False, True, False)
    assert measured.accuracy == proportion(3, 5)


def test_permuted_options_give_the_permuted_result(tiny_loaded):
    turned = [replace(q, options=q.options[::-1], answer=len(q.options) - 1 - q.answer) for q in QUESTIONS]
    first, second = multiple_choice(tiny_loaded, QUESTIONS), multiple_choice(tiny_loaded, turned)
    for ahead, back in zip(first.log_likelihoods, second.log_likelihoods, strict=True):
        assert back[::-1] == pytest.approx(ahead, abs=1e-4)
    assert second.correct == first.correct


def test_the_answer_key_decides_the_score(tiny_loaded):
    chosen = multiple_choice(tiny_loaded, QUESTIONS).chosen
    right = [replace(q, answer=found) for q, found in zip(QUESTIONS, chosen, strict=True)]
    wrong = [replace(q, answer=(found + 1) % len(q.options)) for q, found in zip(QUESTIONS, chosen, strict=True)]
    assert multiple_choice(tiny_loaded, right).accuracy.estimate == 1
    assert multiple_choice(tiny_loaded, wrong).accuracy.estimate == 0
    assert multiple_choice(tiny_loaded, [*right[:1], *wrong[1:]]).accuracy.estimate == 0.25


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "at least one question"),
        ([Question("a", (" b",), 0)], "fewer than two options"),
        ([Question("a", (" b", " c"), 2)], "names option 2"),
        ([Question("a", (" b", " c"), -1)], "names option -1"),
        ([Question("a", (" b", ""), 0)], "empty option"),
        ([Question(" \n", (" b", " c"), 0)], "empty prompt"),
        ([Question("She sa", ("w", "t on a chair"), 0)], "no token of its own"),
        ([QUESTIONS[0], Question("goat " * 130, (" b", " c"), 0)], "the context holds 128"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(tiny_loaded, questions, message):
    with pytest.raises(WorkbookError, match=message):
        multiple_choice(tiny_loaded, questions)


def test_a_batch_of_nothing_is_refused(tiny_loaded):
    with pytest.raises(WorkbookError, match="batch_size"):
        multiple_choice(tiny_loaded, QUESTIONS, batch_size=0)


@pytest.mark.parametrize("name", ["falcon-chat", "chatml", "plain"])
def test_the_harness_agrees_with_multiple_choice_item_by_item(tiny_loaded, name):
    loaded, limit = replace(tiny_loaded, format=format_for(name)), None if name == "falcon-chat" else 20
    questions = animal_questions(limit)
    ours, theirs = multiple_choice(loaded, questions), evaluate(loaded, ["animal_choice"], limit)
    found = theirs.log_likelihoods["animal_choice"]
    assert len(found) == len(questions)
    assert np.array(found) == pytest.approx(np.array(ours.log_likelihoods), abs=1e-3)
    (row,) = theirs.rows
    share = sum(ours.correct) / len(found)
    assert (row.task, row.metric, row.count) == ("animal_choice", "acc", len(found))
    assert 0 < share < 1
    assert row.value == pytest.approx(share)
    assert row.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(found) - 1)))
    (shown,) = theirs.table().to_dict("records")
    assert (shown["value"], shown["count"]) == (row.value, row.count)
    assert theirs.version.startswith("0.4.")


def test_neither_place_of_the_animal_task_holds_the_answer_always():
    first = [question.answer == 0 for question in animal_questions()]
    assert 0.35 < sum(first) / len(first) < 0.65


def test_the_harness_prints_and_warns_nothing(tiny_loaded, capfd, caplog, recwarn):
    evaluate(tiny_loaded, ["animal_choice"], 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


def test_the_harness_leaves_everything_as_it_was(tiny_loaded, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    loaded = replace(tiny_loaded, tokenizer=copy.deepcopy(tiny_loaded.tokenizer))
    loaded.tokenizer.pad_token = None
    loaded.model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        evaluate(loaded, ["animal_choice"], 2)
        assert all(module.training for module in loaded.model.modules())
    finally:
        loaded.model.eval()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert loaded.tokenizer.pad_token is None
    assert not list(tmp_path.iterdir())
    assert not datasets.are_progress_bars_disabled()


def test_the_harness_leaves_an_output_layer_of_its_own_alone(tiny_loaded):
    loaded = replace(tiny_loaded, model=copy.deepcopy(tiny_loaded.model))
    head = torch.nn.Parameter(loaded.model.lm_head.weight.detach().flip(0))
    loaded.model.lm_head.weight = head
    assert loaded.model.config.tie_word_embeddings
    found = evaluate(loaded, ["animal_choice"], 4).log_likelihoods["animal_choice"]
    assert loaded.model.lm_head.weight is head
    assert np.array(found) == pytest.approx(
        np.array(multiple_choice(loaded, animal_questions(4)).log_likelihoods), abs=1e-3
    )


@pytest.mark.parametrize("tasks", [[], ["animal_choice", "hellaswag"], "animal_choice"])
def test_an_unknown_task_is_refused_and_the_known_are_listed(tiny_loaded, tasks):
    with pytest.raises(WorkbookError, match="of these: animal_choice"):
        evaluate(tiny_loaded, tasks)


def test_limits_below_one_and_items_beyond_the_context_are_refused(tiny_loaded):
    with pytest.raises(WorkbookError, match="limit"):
        evaluate(tiny_loaded, ["animal_choice"], 0)
    model = copy.copy(tiny_loaded.model)
    model.config = copy.copy(model.config)
    model.config.max_position_embeddings = 16
    with pytest.raises(WorkbookError, match="the context holds 16"):
        evaluate(replace(tiny_loaded, model=model), ["animal_choice"], 2)
