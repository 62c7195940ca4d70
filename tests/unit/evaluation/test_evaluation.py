"""Perplexity and multiple choice against log_softmax by hand, transformers' own loss and lm-evaluation-harness."""

import copy
import json
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.base import WorkbookError, proportion
from helpers.base.files import ROOT
from helpers.evaluation import Question, evaluate, multiple_choice, perplexity
from helpers.evaluation.harness_model import _harness_model
from helpers.evaluation.likelihood import _windows
from helpers.evaluation.options import _MultipleChoice
from helpers.generation import Sampling, generate
from helpers.models import PromptTooLong, format_for, load, load_profile

pytestmark = pytest.mark.usefixtures("one_thread")
PERPLEXITY_TEXTS = ROOT / "notebooks/data/perplexity_texts.jsonl"
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
    for begin in range(0, len(ids), 64):
        first = 1 if begin == 0 else begin + 64
        window = torch.tensor(ids[begin : begin + 128])
        with torch.no_grad():
            logs = tiny_loaded.model(window[None]).logits[0].double().log_softmax(-1)
        for position in range(first, min(begin + 128, len(ids))):
            expected -= float(logs[position - 1 - begin, ids[position]])
    assert perplexity(tiny_loaded, [text]).nll[0] == pytest.approx(expected, rel=1e-5)


@given(length=st.integers(2, 300), context=st.integers(2, 64))
def test_windows_score_every_position_once_with_enough_before_it(length, context):
    found = _windows(length, context, context // 2)
    assert [p for _, scored, end in found for p in range(scored, end)] == list(range(1, length))
    for begin, scored, end in found:
        assert 0 <= begin < scored < end <= length
        assert end - begin <= context
        assert scored - begin >= min(scored, context // 2)


def documented_loop(model, ids: list[int], window: int, stride: int) -> float:
    """The summed loss of the loop in transformers' documentation, "Perplexity of fixed-length models"."""
    total, before = 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        part = torch.tensor([ids[begin:end]])
        labels = part.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            total += float(model(part, labels=labels).loss) * int((labels[:, 1:] != -100).sum())
        before = end
        if end == len(ids):
            break
    return total


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 16), (64, 63), (40, 1), (128, 100), (None, None)])
def test_windows_in_padded_batches_equal_the_documented_loop(tiny_loaded, window, stride):
    texts = [*TEXTS, "The falcon flew over the hill and the river. " * 18]
    rows = [[0, *tiny_loaded.tokenizer(text, verbose=False)["input_ids"]] for text in texts]
    expected = [documented_loop(tiny_loaded.model, ids, window or 128, stride or 64) for ids in rows]
    assert len(rows[-1]) > 128
    for batch_size in (1, 4, 7):
        measured = perplexity(tiny_loaded, texts, window=window, stride=stride, batch_size=batch_size)
        assert measured.nll == pytest.approx(expected, rel=1e-5)
        assert measured.text_tokens == tuple(len(ids) - 1 for ids in rows)


@pytest.fixture(scope="module")
def falcon_mini():
    return load(load_profile("laptop").falcon, "fp32")


def test_falcon_mini_equals_the_loss_of_transformers_on_short_and_long_texts(falcon_mini):
    texts = [json.loads(line)["text"] for line in PERPLEXITY_TEXTS.read_text(encoding="utf-8").splitlines()[:4]]
    long = " ".join(texts)
    short_ids, long_ids = ([0, *falcon_mini.tokenizer(text, verbose=False)["input_ids"]] for text in (texts[0], long))
    assert len(short_ids) < 512 < len(long_ids)
    with torch.no_grad():
        ids = torch.tensor([short_ids])
        short = float(falcon_mini.model(ids, labels=ids).loss)
    measured = perplexity(falcon_mini, [texts[0], long])
    losses = [nll / tokens for nll, tokens in zip(measured.nll, measured.text_tokens, strict=True)]
    expected = documented_loop(falcon_mini.model, long_ids, 512, 256) / (len(long_ids) - 1)
    assert losses == pytest.approx([short, expected], abs=1e-4)
    one, four = (perplexity(falcon_mini, texts, batch_size=size) for size in (1, 4))
    assert four.nll == pytest.approx(one.nll, rel=1e-5)


def test_errors_over_the_texts_are_those_of_a_ratio(tiny_loaded):
    measured = perplexity(tiny_loaded, TEXTS)
    bits = [value / math.log(2) for value in measured.nll]
    sizes = [len(text.encode()) for text in TEXTS]
    assert measured.text_bytes == tuple(sizes)
    rest = [x - measured.bits_per_byte * y for x, y in zip(bits, sizes, strict=True)]
    error = math.sqrt(3 / 2 * sum(x * x for x in rest)) / sum(sizes)
    assert measured.standard_error == pytest.approx(error)
    half = 4.302653 * error  # t(0.975, 2)
    found = measured.bits_per_byte_interval
    assert (found.low, found.high) == pytest.approx((measured.bits_per_byte - half, measured.bits_per_byte + half))
    interval = measured.perplexity_interval
    assert interval.estimate == measured.perplexity
    assert math.log(interval.low * interval.high) == pytest.approx(2 * math.log(measured.perplexity))
    with pytest.raises(ValueError, match="two pairs"):
        _ = perplexity(tiny_loaded, TEXTS[:1]).standard_error


def test_bits_per_byte_are_those_of_the_harness(tiny_loaded, tmp_path):
    texts = [*TEXTS, "The bird sang.", "A fox came by and said hello."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "rolling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "rolling.yaml").write_text(json.dumps(task))
    (row,) = evaluate(tiny_loaded, ["rolling"], folder=tmp_path).rows
    assert (row.metric, row.count) == ("bits_per_byte", 5)
    assert row.value == pytest.approx(perplexity(tiny_loaded, texts).bits_per_byte, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be a whole number from 2"),
        ({"window": 129}, "window must be a whole number from 2 to 128"),
        ({"window": 64, "stride": 64}, "stride must be a whole number from 1 to 63"),
        ({"stride": 0}, "stride"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_windows_are_refused(tiny_loaded, options, message):
    with pytest.raises(WorkbookError, match=message):
        perplexity(tiny_loaded, TEXTS, **options)


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


def test_an_impossible_limit_is_refused(tiny_loaded):
    with pytest.raises(WorkbookError, match="max_tokens"):
        perplexity(tiny_loaded, TEXTS, max_tokens=0)


def test_without_a_token_that_begins_documents_the_first_token_is_only_read(tiny_loaded):
    """B5"""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    renamed = tiny_loaded.tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(renamed))
    loaded, text = replace(tiny_loaded, tokenizer=bare), TEXTS[0]
    ids = bare.encode(text)
    with torch.no_grad():
        logs = tiny_loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = perplexity(loaded, [text])
    assert found.nll[0] == pytest.approx(-sum(float(logs[n, token]) for n, token in enumerate(ids[1:])), rel=1e-4)
    first = len(bare.decode(ids[:1]).encode())
    assert (found.begins_with, found.tokens, found.bytes) == ("", len(ids) - 1, len(text.encode()) - first)
    with pytest.raises(WorkbookError, match="too short"):
        perplexity(loaded, [" "])


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


def test_options_that_are_equal_after_equal_prompts_are_scored_once(tiny_loaded):
    once, rows = multiple_choice(tiny_loaded, QUESTIONS), []
    hook = tiny_loaded.model.register_forward_pre_hook(
        lambda model, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    twice = multiple_choice(tiny_loaded, [*QUESTIONS, *QUESTIONS])
    hook.remove()
    assert sum(rows) == sum(len(question.options) for question in QUESTIONS)
    assert twice.log_likelihoods == once.log_likelihoods * 2


def test_multiple_choice_chooses_the_likeliest_and_counts():
    measured = _MultipleChoice(((-3.0, -1.0), (-1.0, -2.0), (-5.0, -7.0), (-4.0, -4.0), (-9.0, -8.0)), (1, 0, 1, 0, 0))
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


def direct(model, tokenizer, pairs: list[tuple[str, str]], batch_size: int) -> list[float]:
    """ln p of each second text after its first: plain forwards, padded on the left, log_softmax and gather."""
    found = []
    for begin in range(0, len(pairs), batch_size):
        part = pairs[begin : begin + batch_size]
        whole = [tokenizer(before + option)["input_ids"] for before, option in part]
        width = max(map(len, whole))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in whole])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in whole])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits.float()
        logs = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        scored = [len(row) - len(tokenizer(before)["input_ids"]) for (before, _), row in zip(part, whole, strict=True)]
        found += [float(row[-count:].sum()) for row, count in zip(logs, scored, strict=True)]
    return found


def items_of(name: str, count: int) -> list[dict]:
    lines = (ROOT / f"notebooks/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.mark.parametrize("name", ["story_endings", "short_facts"])
def test_the_harness_equals_a_direct_forward_on_ten_items(falcon_mini, name):
    pairs = [(item["text"], f" {option}") for item in items_of(name, 10) for option in item["options"]]
    expected = np.array(direct(falcon_mini.model, falcon_mini.tokenizer, pairs, 8)).reshape(10, 2)
    for batch_size in (1, 7):
        found = evaluate(falcon_mini, [name], 10, batch_size=batch_size)
        assert np.array(found.log_likelihoods[name]) == pytest.approx(expected, abs=1e-3)
    keys = np.array([item["answer"] for item in items_of(name, 10)])
    row = next(row for row in found.rows if row.metric == "acc")
    assert row.value == pytest.approx((expected.argmax(1) == keys).mean())
    assert found.items[name].values["acc"] == tuple((expected.argmax(1) == keys).astype(float))


@pytest.mark.slow
def test_the_harness_equals_a_direct_forward_of_the_llama_side():
    loaded = load(load_profile("laptop").llama_chat, "fp32")
    pairs = [(item["text"], f" {option}") for item in items_of("short_facts", 6) for option in item["options"]]
    expected = np.array(direct(loaded.model, loaded.tokenizer, pairs, 5)).reshape(6, 2)
    found = evaluate(loaded, ["short_facts"], 6).log_likelihoods["short_facts"]
    assert np.array(found) == pytest.approx(expected, abs=1e-3)


def test_a_task_is_asked_in_the_chat_format_where_its_file_says_so(tiny_loaded):
    names = ["short_facts_chat", "short_facts", "story_endings_chat"]
    found = evaluate(tiny_loaded, names, 2).log_likelihoods
    (fact, _), (story, _) = items_of("short_facts", 2), items_of("story_endings", 2)
    asked = {
        "short_facts": [(fact["text"], f" {o}") for o in fact["options"]],
        "short_facts_chat": [
            (f"User: Complete the sentence: {fact['text']} ...\nFalcon:", f" {fact['text']} {o}.")
            for o in fact["options"]
        ],
        "story_endings_chat": [
            (f"User: What comes next in this story? {story['text']}\nFalcon:", f" {o}") for o in story["options"]
        ],
    }
    for name, pairs in asked.items():
        assert found[name][0] == pytest.approx([by_hand(tiny_loaded, *pair) for pair in pairs], abs=1e-3)


@pytest.mark.parametrize(("name", "limit"), [("story_endings", 40), ("short_facts", None)])
def test_falcon_mini_is_above_chance_on_the_tasks(falcon_mini, name, limit):
    scores = evaluate(falcon_mini, [name], limit).items[name].values["acc"]
    assert proportion(int(sum(scores)), len(scores)).low > 0.5


def test_items_longer_than_the_context_lose_their_beginning_and_are_counted(tiny_loaded):
    model = copy.copy(tiny_loaded.model)
    model.config = copy.copy(model.config)
    model.config.max_position_embeddings = 32
    found = evaluate(replace(tiny_loaded, model=model), ["story_endings"], 8, truncate=True)
    sizes = [
        [len(tiny_loaded.tokenizer(f"{item['text']} {option}")["input_ids"]) for option in item["options"]]
        for item in items_of("story_endings", 8)
    ]
    assert found.truncated == sum(size > 33 for pair in sizes for size in pair) > 0  # the last one is only predicted
    item, first = items_of("story_endings", 1)[0], found.log_likelihoods["story_endings"][0][0]
    ids = tiny_loaded.tokenizer(f"{item['text']} {item['options'][0]}")["input_ids"]
    option = len(ids) - len(tiny_loaded.tokenizer(item["text"])["input_ids"])
    with torch.no_grad():
        logs = tiny_loaded.model(torch.tensor([ids[-33:]])).logits[0].double().log_softmax(-1)
    assert first == pytest.approx(
        sum(float(logs[place - 1, ids[-33:][place]]) for place in range(33 - option, 33)), abs=1e-3
    )


@pytest.mark.parametrize("tasks", [[], "animal_choice"])
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


def write_generate_task(folder, rows, *, chat=True, metadata=None, **more):
    """A task "written" whose answers the model writes; an answer counts if it is exactly the row's."""
    (folder / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "written", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": "written.jsonl"}}, "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "metadata": {"version": 1, "chat": chat, **(metadata or {})},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["NEVER"], "max_gen_toks": 12}, **more,
    }  # fmt: skip
    (folder / "written.yaml").write_text(json.dumps(task))


def replies_of(loaded, questions, **sampling):
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [generate(loaded, prompt, Sampling(temperature=0, **sampling)).text for prompt in asked]


QUESTIONS_TO_WRITE = ["What is red?", "Say   <|endoftext|> twice.", "Why?", "Who are you, and how?"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_chat_task_is_answered_as_generate_does(tiny_loaded, tmp_path, batch_size):
    """B2: the answers were scored with the space before them, and stop strings were ignored."""
    free = replies_of(tiny_loaded, QUESTIONS_TO_WRITE, max_new_tokens=12)
    stop = free[0][3:6]
    form = stopping_format(stop)
    loaded = replace(tiny_loaded, format=form)
    answers = replies_of(loaded, QUESTIONS_TO_WRITE, max_new_tokens=12)
    assert free[0].startswith(answers[0] + stop) or answers[0] == free[0][:3].strip()
    assert len(set(answers)) > 2
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS_TO_WRITE, answers, strict=True)]
    write_generate_task(tmp_path, rows)
    found = evaluate(loaded, ["written"], folder=tmp_path, batch_size=batch_size)
    assert found.items["written"].values["exact_match"] == (1.0,) * 4


def stopping_format(stop):
    @dataclass(frozen=True)
    class Stopping(type(format_for("falcon-chat"))):
        stop_strings = (*format_for("falcon-chat").stop_strings, stop)

    return Stopping()


def test_the_harness_reads_what_the_projects_own_reader_reads(tiny_loaded, tmp_path):
    """A5: datasets' reader takes no mark before the text, and no UTF-16; of a key that is there twice it takes one."""
    (answer,) = replies_of(tiny_loaded, QUESTIONS_TO_WRITE[:1], max_new_tokens=12)
    rows = [{"question": QUESTIONS_TO_WRITE[0], "answer": answer}]
    write_generate_task(tmp_path, rows)
    file = tmp_path / "written.jsonl"
    file.write_bytes((file.read_text() + "\r\n").encode("utf-16"))
    assert evaluate(tiny_loaded, ["written"], folder=tmp_path).rows[0].value == 1
    file.write_text('{"question": "a", "question": "b", "answer": "x"}')
    with pytest.raises(WorkbookError, match=r"line 1 \(row 1\): The key 'question' is there twice"):
        evaluate(tiny_loaded, ["written"], folder=tmp_path)


def test_a_chat_tasks_own_stop_string_ends_the_answer_too(tiny_loaded, tmp_path):
    """B2"""
    (free,) = replies_of(tiny_loaded, QUESTIONS_TO_WRITE[:1], max_new_tokens=12)
    settings = {"until": [free[4:7]], "max_gen_toks": 12}
    rows = [{"question": QUESTIONS_TO_WRITE[0], "answer": free[: free.index(free[4:7])].strip()}]
    write_generate_task(tmp_path, rows, generation_kwargs=settings)
    assert evaluate(tiny_loaded, ["written"], folder=tmp_path).rows[0].value == 1


def test_a_chat_task_may_begin_the_reply(tiny_loaded, tmp_path):
    """B2's sibling: the reply's beginning (gen_prefix) was closed by a line end, as an earlier reply is."""
    text = "User: Why?\nFalcon: Because"
    reply = generate(tiny_loaded, text, Sampling(temperature=0, max_new_tokens=12)).text
    write_generate_task(tmp_path, [{"question": "Why?", "answer": reply.strip()}], gen_prefix="Because")
    assert evaluate(tiny_loaded, ["written"], folder=tmp_path).rows[0].value == 1


@pytest.mark.parametrize("chat", [True, False])
def test_a_long_prompt_of_a_writing_task_is_refused_or_counted(tiny_loaded, tmp_path, chat):
    """B2's sibling: the harness shortens such prompts without a word."""
    rows = [{"question": "word " * 120, "answer": "x"}, {"question": "q", "answer": "x"}]
    write_generate_task(tmp_path, rows, chat=chat)
    with pytest.raises(PromptTooLong, match="room for 116"):
        evaluate(tiny_loaded, ["written"], folder=tmp_path)
    assert evaluate(tiny_loaded, ["written"], folder=tmp_path, truncate=True).truncated == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"max_gen_toks": 128}, "128 new tokens"), ({"max_gen_toks": 4, "num_beams": 3}, "num_beams")],
)
def test_a_writing_task_that_cannot_be_asked_is_refused(tiny_loaded, tmp_path, settings, words):
    write_generate_task(tmp_path, [{"question": "q", "answer": "x"}], generation_kwargs={"until": ["\n"], **settings})
    with pytest.raises(WorkbookError, match=words):
        evaluate(tiny_loaded, ["written"], folder=tmp_path)


def test_perplexity_begins_with_the_token_that_began_documents(tiny_loaded):
    """B5: and says which; the harness takes the same."""
    assert perplexity(tiny_loaded, TEXTS[:1]).begins_with == "<|endoftext|>"
    chat = replace(tiny_loaded, tokenizer=copy.deepcopy(tiny_loaded.tokenizer))
    chat.tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    named = perplexity(chat, TEXTS[:1])
    assert named == perplexity(tiny_loaded, TEXTS[:1])
    assert _harness_model(chat, False, 1, False).prefix_token_id == 0


def test_nothing_in_a_scored_text_is_a_control_token(tiny_loaded):
    """A10"""
    found = perplexity(tiny_loaded, ["one<|endoftext|>two"])
    assert found.tokens == len(tiny_loaded.tokenizer.encode("one<|endoftext|>two", split_special_tokens=True)) > 5
