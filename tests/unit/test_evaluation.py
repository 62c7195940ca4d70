"""Perplexity against log_softmax by hand and against transformers' own loss."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.evaluation import perplexity, windows
from helpers.types import WorkbookError

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
    import copy

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
    import copy

    bare = copy.deepcopy(tiny_loaded.tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(WorkbookError, match="neither a begin nor an end token"):
        perplexity(replace(tiny_loaded, tokenizer=bare), TEXTS)
    bare.eos_token = "<|endoftext|>"
    assert perplexity(replace(tiny_loaded, tokenizer=bare), TEXTS) == perplexity(tiny_loaded, TEXTS)
