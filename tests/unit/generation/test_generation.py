"""Generation against transformers' own, against plain loops of torch, and under every way a reply can end."""

import copy
import math
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.base import WorkbookError
from helpers.generation import Reply, Sampling, generate, generate_batch, generating, next_token_probabilities, stream
from helpers.generation.generating import _fitting
from helpers.generation.sampling import _processors
from helpers.generation.stops import _StopFilter
from helpers.models import MessageError, PromptTooLong, context_tokens, encode, format_for

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0, max_new_tokens=16)
HOT = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16, seed=3)
ASK = [{"role": "user", "content": "Tell me a story"}]


def stopping_at(loaded, *stops):
    """The same model with a plain format that has these stop strings."""

    @dataclass(frozen=True)
    class Stopping(type(format_for("plain"))):
        stop_strings = stops

    return replace(loaded, format=Stopping())


def drain(pieces) -> tuple[list[str], Reply]:
    """All pieces of a stream, and the reply it returns."""
    shown = []
    while True:
        try:
            shown.append(next(pieces))
        except StopIteration as end:
            return shown, end.value


def untimed(reply: Reply) -> Reply:
    return replace(reply, seconds=0.0, first_token_seconds=0.0)


# One reply, against transformers and a plain loop


def test_greedy_equals_transformers_and_a_loop_without_cache(tiny_loaded):
    ids = torch.tensor([tiny_loaded.tokenizer("The cat sat on")["input_ids"]])
    theirs = tiny_loaded.model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :]
    grown = ids
    with torch.no_grad():
        for _ in range(16):
            grown = torch.cat([grown, tiny_loaded.model(grown).logits[:, -1:].argmax(-1)], dim=1)
    reply = generate(tiny_loaded, "The cat sat on", GREEDY)
    assert list(reply.token_ids) == theirs.tolist() == grown[0, ids.shape[1] :].tolist()
    assert reply.text == tiny_loaded.tokenizer.decode(theirs)
    assert (reply.tokens, reply.prompt_tokens, reply.finish_reason) == (16, ids.shape[1], "length")


def test_a_reply_to_messages_is_stripped_and_one_to_a_text_is_not(tiny_loaded):
    text = tiny_loaded.format.render(ASK)
    tries = [replace(HOT, max_new_tokens=3, seed=seed) for seed in range(30)]
    spaced = next(sampling for sampling in tries if generate(tiny_loaded, text, sampling).text.startswith(" "))
    completion, reply = (generate(tiny_loaded, prompt, spaced) for prompt in (text, ASK))
    assert reply.token_ids == completion.token_ids
    assert reply.text == completion.text.strip()
    assert "".join(stream(tiny_loaded, ASK, spaced)) == reply.text
    assert "".join(stream(tiny_loaded, text, spaced)) == completion.text


def test_nothing_leaks_from_the_checkpoints_generation_settings(tiny_loaded):
    from transformers import GenerationConfig

    changed = replace(tiny_loaded, model=copy.deepcopy(tiny_loaded.model))
    first = generate(tiny_loaded, ASK, GREEDY).token_ids[0]
    theirs = GenerationConfig(
        eos_token_id=0, repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[first], do_sample=True,
        min_new_tokens=5, bad_words_ids=[[first]], temperature=2.0, top_k=1, max_length=7, num_beams=2,
    )  # fmt: skip
    changed.model.generation_config = theirs
    for sampling in (GREEDY, HOT):
        assert untimed(generate(changed, ASK, sampling)) == untimed(generate(tiny_loaded, ASK, sampling))
    assert changed.model.generation_config is theirs


def test_a_model_in_training_generates_without_dropout_and_goes_on_training(tiny_loaded):
    loaded = replace(tiny_loaded, model=copy.deepcopy(tiny_loaded.model))
    loaded.model.config.hidden_dropout = 0.5
    loaded.model.train()
    assert untimed(generate(loaded, ASK, GREEDY)) == untimed(generate(tiny_loaded, ASK, GREEDY))
    assert loaded.model.training
    assert all(module.training for module in loaded.model.modules())


@pytest.mark.filterwarnings("ignore")
def test_a_model_offloaded_to_disk_generates_and_is_scored_alike(tiny_loaded, tmp_path):
    from transformers import AutoModelForCausalLM

    from helpers.evaluation import perplexity

    tiny_loaded.model.save_pretrained(tmp_path)
    offloaded = replace(tiny_loaded, model=AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"}))
    assert offloaded.model.device.type == "meta"
    assert untimed(generate(offloaded, ASK, HOT)) == untimed(generate(tiny_loaded, ASK, HOT))
    assert next_token_probabilities(offloaded, "The") == next_token_probabilities(tiny_loaded, "The")
    assert perplexity(offloaded, ["The cat sat"]) == perplexity(tiny_loaded, ["The cat sat"])


# Sampling


def test_same_seed_same_text_and_the_callers_random_state_is_untouched(tiny_loaded):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(tiny_loaded, ASK, HOT)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert generate(tiny_loaded, ASK, HOT).text == first.text
    assert len({generate(tiny_loaded, ASK, replace(HOT, seed=seed)).text for seed in range(4)}) == 4


def test_a_stream_is_not_disturbed_by_draws_of_the_caller(tiny_loaded):
    pieces = []
    for piece in stream(tiny_loaded, ASK, HOT):
        torch.manual_seed(len(pieces))
        pieces.append(piece)
    assert "".join(pieces) == generate(tiny_loaded, ASK, HOT).text


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution of temperature, then nucleus sampling (Holtzman et al. 2020), by a plain loop."""
    full = torch.softmax(logits.double() / temperature, dim=-1)
    kept, mass = torch.zeros_like(full), 0.0
    for token in full.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept[token], mass = full[token], mass + float(full[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.7, 0.5)])
def test_draws_follow_the_nucleus_distribution(temperature, top_p):
    from scipy.stats import chisquare

    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    expected = nucleus(logits[0], temperature, top_p)
    sampling, counts, draws = Sampling(temperature=temperature, top_p=top_p, seed=11), torch.zeros(30), 8_000
    processors = _processors(sampling, [sampling.seed])
    for _ in range(draws):
        scores = logits
        for processor in processors:
            scores = processor(None, scores)
        counts[scores.argmax()] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible].numpy(), (expected[possible] * draws).numpy()).pvalue > 0.001


def test_a_temperature_near_zero_is_greedy(tiny_loaded):
    cold = replace(GREEDY, temperature=1e-4, top_p=1)
    assert generate(tiny_loaded, ASK, cold).token_ids == generate(tiny_loaded, ASK, GREEDY).token_ids


# How a reply ends


def test_end_token_named_only_by_the_checkpoint_ends_the_reply(tiny_loaded):
    free = generate(tiny_loaded, "Once upon", HOT)
    loaded = replace(tiny_loaded, model=copy.deepcopy(tiny_loaded.model))
    end = next(i for i in range(5, 16) if free.token_ids[i] not in free.token_ids[:i])
    loaded.model.generation_config.eos_token_id = [0, free.token_ids[end]]
    reply = generate(loaded, "Once upon", HOT)
    assert reply.finish_reason == "end"
    assert reply.token_ids == free.token_ids[: end + 1]
    assert (reply.tokens, reply.text) == (end + 1, tiny_loaded.tokenizer.decode(free.token_ids[:end]))


def test_stop_string_across_tokens_is_cut_and_ends_generation(tiny_loaded):
    free = generate(tiny_loaded, "Once upon", HOT)
    position = next(i for i in range(10, len(free.text)) if free.text[i : i + 6] not in free.text[: i + 5])
    stop = free.text[position : position + 6]
    reply = generate(stopping_at(tiny_loaded, "not there", stop), "Once upon", HOT)
    assert (reply.finish_reason, reply.text) == ("stop", free.text[:position])
    assert reply.token_ids == free.token_ids[: reply.tokens]
    decode = tiny_loaded.tokenizer.decode
    assert stop in decode(reply.token_ids)
    assert stop not in decode(reply.token_ids[:-1])
    pieces, streamed = drain(stream(stopping_at(tiny_loaded, "not there", stop), "Once upon", HOT))
    assert "".join(pieces) == reply.text
    assert untimed(streamed) == untimed(reply)


def test_a_stop_string_in_the_prompt_does_not_stop(tiny_loaded):
    loaded = stopping_at(tiny_loaded, "User:")
    assert generate(loaded, "User: hello\nUser:", GREEDY).finish_reason == "length"


def test_the_context_limits_the_reply(tiny_loaded):
    prompt = "word " * 100
    used = len(encode(tiny_loaded.tokenizer, prompt))
    reply = generate(tiny_loaded, prompt, replace(GREEDY, max_new_tokens=1000))
    assert used + reply.tokens == context_tokens(tiny_loaded) == 128
    assert reply.finish_reason == "length"


def test_messages_leave_room_for_the_reply(tiny_loaded):
    turn = [{"role": "user", "content": "a b c d e f g"}, {"role": "assistant", "content": "h i j k l"}]
    messages = [{"role": "system", "content": "S"}, *turn * 9, *ASK]
    text = tiny_loaded.format.render(_fitting(tiny_loaded, messages, max_new_tokens=40))
    size, one_turn = (
        len(encode(tiny_loaded.tokenizer, part)) for part in (text, tiny_loaded.format.render(turn, False))
    )
    assert 128 - 40 - one_turn < size <= 128 - 40
    assert text.startswith("System: S\nUser: a b")
    assert text.endswith("User: Tell me a story\nFalcon:")
    assert generate(tiny_loaded, messages, replace(GREEDY, max_new_tokens=40)).prompt_tokens == size
    greedy_for_room = tiny_loaded.format.render(_fitting(tiny_loaded, messages, max_new_tokens=1000))
    assert 64 - one_turn < len(encode(tiny_loaded.tokenizer, greedy_for_room)) <= 64


@pytest.mark.parametrize("call", [generate, stream, lambda loaded, prompt: generate_batch(loaded, ["ok", prompt])])
@pytest.mark.parametrize(
    ("prompt", "error", "complaint"),
    [
        ("", WorkbookError, "prompt is empty"),
        ("word " * 200, PromptTooLong, "room for 127"),
        ([{"role": "user", "content": "word " * 200}], PromptTooLong, "room for 78"),
        ([], MessageError, "Give a list"),
        ([{"role": "assistant", "content": "x"}], MessageError, "'user' is expected"),
    ],
)
def test_impossible_prompts_are_refused_before_generating(tiny_loaded, call, prompt, error, complaint):
    with pytest.raises(error, match=complaint):
        call(tiny_loaded, prompt)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_impossible_sampling_is_refused(tiny_loaded, wrong, name):
    with pytest.raises(WorkbookError, match=name):
        generate(tiny_loaded, "x", replace(GREEDY, **wrong))


# Streams


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_stream_gives_the_whole_reply_in_pieces(tiny_loaded, sampling):
    pieces, reply = drain(stream(tiny_loaded, ASK, sampling))
    assert "".join(pieces) == reply.text
    assert len(pieces) > 10
    assert untimed(reply) == untimed(generate(tiny_loaded, ASK, sampling))


def answer_of(loaded, ids, **changes):
    """What the reply and its pieces are when the model generates these tokens."""
    limit = changes.pop("limit", len(ids))
    answer = generating._Answer(loaded, [5, 6, 7], limit, strip=changes.pop("strip", False))
    pieces = [answer.add(token, 0.1 * (n + 1)) for n, token in enumerate(ids)]
    return pieces, answer.reply()


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab é🦅日\n :UserFalco")), strip=st.booleans())
def test_characters_split_over_tokens_arrive_whole(tiny_loaded, text, strip):
    """Byte-level tokens cut é, 🦅 and 日 in pieces: joined they are the text, and none is ever half a character."""
    loaded = stopping_at(tiny_loaded, "\nUser:")
    ids = loaded.tokenizer.encode(text)
    pieces, reply = answer_of(loaded, [*ids, 0], strip=strip)
    expected = text.split("\nUser:")[0]
    assert "".join(pieces) == reply.text == (expected.strip() if strip else expected)
    assert "\ufffd" not in reply.text
    assert reply.finish_reason == ("stop" if "\nUser:" in text else "end")


@pytest.mark.parametrize("end", [[], [0]], ids=["cut at the limit", "end token"])
@pytest.mark.parametrize("strip", [True, False])
def test_a_character_that_never_completes_is_left_out(tiny_loaded, strip, end):
    """A4"""
    before, eagle = tiny_loaded.tokenizer.encode(" Fine"), tiny_loaded.tokenizer.encode("🦅")
    assert len(eagle) > 1
    pieces, reply = answer_of(tiny_loaded, [*before, *eagle[:-1], *end], strip=strip)
    assert "".join(pieces) == reply.text == ("Fine" if strip else " Fine")
    assert reply.tokens == len(before) + len(eagle) - 1 + len(end)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (" Fine.\n\nUser: x", "Fine."),
        ("\nUser: x", ""),
        (" \n \nUser:", ""),
        ("\n\nFine,\n  thank you. \n\n", "Fine,\n  thank you."),
        ("\u00a0Fine.\u3000", "Fine."),
        (" Fine. User: x", "Fine."),
        (" Fine.\n### Response", "Fine."),
    ],
)
def test_a_reply_is_what_the_format_was_trained_on(tiny_loaded, written, kept):
    """A4, A9: stripped, and nothing of what follows a stop string."""
    pieces, reply = answer_of(tiny_loaded, [*tiny_loaded.tokenizer.encode(written), 0], strip=True)
    assert "".join(pieces) == reply.text == kept


def test_a_broken_character_before_a_stop_string_is_left_out(tiny_loaded):
    """A4"""
    encode = tiny_loaded.tokenizer.encode
    ids = [*encode(" Fine"), *encode("🦅")[:-1], *encode("\nUser:")]
    assert "\ufffd" in tiny_loaded.tokenizer.decode(ids)
    pieces, reply = answer_of(tiny_loaded, ids, strip=True)
    assert "".join(pieces) == reply.text == "Fine"


def byte_fallback_tokenizer():
    """A tokenizer as Llama-2's, with three words and all bytes: every other character is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁live", "▁in", "▁Portugal", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_a_continuation_keeps_the_space_that_sentencepiece_decoders_drop():
    tokenizer = byte_fallback_tokenizer()
    assert tokenizer.decode([3]) == "Portugal"
    eagle = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "🦅".encode()])
    assert generating._continuation(tokenizer, [1, 2], [3, *eagle]) == " Portugal🦅"


@pytest.mark.parametrize("text", ["a🦅", "🦅🦅", "é" * 9, "a日", "日本語", "a\ufffd\ufffd", "\ufffd" * 4, "🦅a", "é"])
@pytest.mark.parametrize("follows", ["🦅 x", "é", "日本", " a", "a", "\ufffd.", "\n🦅"])
def test_a_continuation_is_decoded_from_a_token_that_begins_a_character(tiny_loaded, text, follows):
    """A8: bytes after one that is inside a character were all taken for broken ones."""
    for tokenizer in (byte_fallback_tokenizer(), tiny_loaded.tokenizer):
        prompt = tokenizer.encode(text, add_special_tokens=False)
        after = tokenizer.encode(text + follows, add_special_tokens=False)[len(prompt) :]
        context = generating._decoding_context(tokenizer, prompt)
        assert generating._continuation(tokenizer, context, after) == follows


def test_an_error_in_the_thread_reaches_the_consumer(tiny_loaded):
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) > 4:
            raise ZeroDivisionError("in the thread")

    hook = tiny_loaded.model.register_forward_hook(failing)
    try:
        pieces = stream(tiny_loaded, ASK, HOT)
        next(pieces)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            list(pieces)
        assert not generating_threads()
    finally:
        hook.remove()


def generating_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("generate")]


@pytest.mark.parametrize("interrupt", [None, KeyboardInterrupt()])
def test_a_consumer_that_stops_early_stops_the_thread(tiny_loaded, interrupt):
    forwards = []

    def slow(*_):
        forwards.append(time.sleep(0.02))

    hook = tiny_loaded.model.register_forward_hook(slow)
    try:
        pieces = stream(tiny_loaded, "Once", replace(HOT, max_new_tokens=100))
        next(pieces)
        if interrupt is None:
            pieces.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                pieces.throw(interrupt)
        assert not generating_threads()
        assert len(forwards) < 10
    finally:
        hook.remove()


def test_a_stream_never_started_starts_no_thread(tiny_loaded):
    pieces = stream(tiny_loaded, ASK, HOT)
    assert not generating_threads()
    pieces.close()


def test_times_are_measured(tiny_loaded):
    waits = iter([0.3, *[0.02] * 9])
    hook = tiny_loaded.model.register_forward_hook(lambda *_: time.sleep(next(waits)))
    try:
        started = time.perf_counter()
        reply = generate(tiny_loaded, "Once", replace(HOT, max_new_tokens=10))
        elapsed = time.perf_counter() - started
    finally:
        hook.remove()
    assert 0.3 <= reply.first_token_seconds < reply.seconds - 9 * 0.02
    assert reply.seconds <= elapsed
    assert reply.tokens_per_second == pytest.approx(9 / (reply.seconds - reply.first_token_seconds))


# Batches


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_batch_equals_single_prompts_token_for_token(tiny_loaded, sampling):
    prompts = [
        "Hi",
        "The cat sat on the",
        ASK,
        "Once upon a time there was a little girl called Lily " * 3,
        "word " * 110,
    ]
    sampling = replace(sampling, max_new_tokens=30)
    batch = generate_batch(tiny_loaded, prompts, sampling)
    assert [untimed(reply) for reply in batch] == [untimed(generate(tiny_loaded, p, sampling)) for p in prompts]
    assert batch[-1].tokens < 30  # its context was full, the others went on


def test_rows_of_a_batch_end_for_their_own_reasons(tiny_loaded):
    prompts = ["Once upon", "The cat"]
    free = generate_batch(tiny_loaded, prompts, HOT)
    loaded = replace(stopping_at(tiny_loaded, free[0].text[20:26]), model=copy.deepcopy(tiny_loaded.model))
    loaded.model.generation_config.eos_token_id = free[1].token_ids[12]
    first, second = generate_batch(loaded, prompts, HOT)
    assert (first.finish_reason, second.finish_reason) == ("stop", "end")
    assert second.tokens <= 13
    assert [untimed(generate(loaded, p, HOT)) for p in prompts] == [untimed(first), untimed(second)]
    later, earlier = sorted((first, second), key=lambda reply: -reply.tokens)
    assert later.seconds > earlier.seconds


def test_an_empty_batch_is_empty(tiny_loaded):
    assert generate_batch(tiny_loaded, []) == []


# The next token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_next_token_probabilities_equal_a_softmax_by_hand(tiny_loaded, temperature):
    ids = tiny_loaded.tokenizer.encode("The cat")
    with torch.no_grad():
        logits = [float(x) / temperature for x in tiny_loaded.model(torch.tensor([ids])).logits[0, -1]]
    total = math.fsum(math.exp(x - max(logits)) for x in logits)
    by_hand = sorted(((math.exp(x - max(logits)) / total, -i) for i, x in enumerate(logits)), reverse=True)[:7]
    found = next_token_probabilities(tiny_loaded, "The cat", k=7, temperature=temperature)
    assert [candidate.token_id for candidate in found] == [-i for _, i in by_hand]
    assert [candidate.probability for candidate in found] == pytest.approx([p for p, _ in by_hand], rel=1e-4)
    assert [candidate.text for candidate in found] == [tiny_loaded.tokenizer.decode([c.token_id]) for c in found]


@pytest.mark.parametrize(("text", "temperature"), [("", 1.0), ("x", 0.0), ("word " * 200, 1.0)])
def test_next_token_probabilities_refuses_what_has_none(tiny_loaded, text, temperature):
    with pytest.raises(WorkbookError):
        next_token_probabilities(tiny_loaded, text, temperature=temperature)


# Stop strings


def cut_by_definition(text: str, stops: list[str]) -> str:
    """Reads character by character; the first stop string to be complete (the longest, if several) is cut off."""
    for end in range(len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)]
    return text


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab\nU:", max_size=30),
    stops=st.lists(st.text("ab\nU:", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_filter_over_any_chunking(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    filtering, shown, expected = _StopFilter(stops), "", cut_by_definition(text, stops)
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += filtering.feed(text[begin:end])
        assert expected.startswith(shown)
        may_begin = max((n for s in stops for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
        assert filtering.stopped or shown == text[: end - may_begin]  # no more is held back than must be
    shown += filtering.flush()
    assert shown == expected
    assert filtering.stopped == (expected != text)
    assert filtering.feed("more") == ("" if filtering.stopped else _StopFilter(stops).feed("more"))


def test_a_model_with_adapters_keeps_its_generation_settings(tiny_loaded):
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny_loaded.model)
    model.generation_config.eos_token_id = [0, 7]
    config = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
    loaded = replace(tiny_loaded, model=get_peft_model(model, config))
    sampling = Sampling(temperature=0, max_new_tokens=5)
    first, second = (generate(loaded, "Once upon a time", sampling) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.text != generate(tiny_loaded, "Once upon a time", sampling).text
    assert model.generation_config.eos_token_id == [0, 7]
    model.generation_config.eos_token_id = [0, first.token_ids[2]]
    ended = generate(loaded, "Once upon a time", sampling)
    assert (ended.finish_reason, ended.token_ids[-1]) == ("end", first.token_ids[2])
