"""Ways of decoding: each says what transformers' own greedy decoding says, and each is what its name says."""

import copy
import re
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers import generation, models
from helpers.base import WorkbookError
from helpers.generation import PLAIN, Chat, Decoding, Sampling, decoding
from helpers.machine import Workload, estimate
from helpers.models import Loaded, ModelRef, load_profile
from helpers.speed.benchmark import _peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0, max_new_tokens=40)
PROMPTS = ["Once upon a time there was a dog.", "The cat said", "The cat sat. The cat sat. The cat sat."]
CAN_COMPILE = shutil.which("g++") and " " not in torch.__file__
needs_compiler = pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs g++, and a path without spaces")


@pytest.fixture(scope="module")
def mini() -> Loaded:
    return models.load(load_profile("laptop").falcon, "fp32")


@pytest.fixture(scope="module")
def mini_chat() -> Loaded:
    return models.load(load_profile("laptop").falcon_chat, "fp32")


@cache
def library_model(ref: ModelRef, layers: int):
    """The library's own Falcon, with as many of the checkpoint's first layers."""
    from transformers import AutoModelForCausalLM

    folder = models.resolve(ref)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=layers).eval()


@cache
def library_tokens(ref: ModelRef, layers: int, prompt: tuple[int, ...]) -> list[int]:
    """Its greedy tokens after a prompt, 40 at most."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = library_model(ref, layers).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
    return found[0, ids.shape[1] :].tolist()


def plain_transformers(loaded: Loaded, prompt: str) -> list[int]:
    """Greedy tokens by the library alone: its own Falcon, nothing of this workbook's decoding."""
    ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return library_tokens(loaded.ref, loaded.model.config.num_hidden_layers, tuple(ids))


def shallow(loaded: Loaded, layers: int) -> Loaded:
    """A draft by hand: the first layers of a model."""
    model = copy.deepcopy(loaded.model)
    model.transformer.h = model.transformer.h[:layers]
    model.config.num_hidden_layers = layers
    return replace(loaded, model=model)


@pytest.mark.parametrize("path", ["plain", "lookup", "speculative"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_way_gives_transformers_greedy_tokens(mini, mini_chat, prompt, path):
    way = Decoding(path, shallow(mini_chat, 2) if path == "speculative" else None)
    for loaded in (mini, mini_chat):
        reply = generation.generate(loaded, prompt, GREEDY, decoding=way)
        assert list(reply.token_ids) == plain_transformers(loaded, prompt)[: reply.tokens]
    streamed = "".join(generation.stream(mini_chat, prompt, GREEDY, decoding=way))
    assert streamed == reply.text  # mini_chat's, the last of the two


@needs_compiler
@pytest.mark.slow
def test_the_compiled_way_gives_transformers_greedy_tokens(mini_chat):
    loaded = shallow(mini_chat, 2)  # of eight layers: each takes its time to compile
    for prompt in PROMPTS:
        reply = generation.generate(loaded, prompt, GREEDY, decoding=Decoding("compiled"))
        assert list(reply.token_ids) == plain_transformers(loaded, prompt)[: reply.tokens]
    assert loaded.decoder.sizes == {(1, 256)}  # compiled once for all of them


@needs_compiler
def test_compiled_batches_and_drawn_replies_equal_plain_ones(tiny_loaded):
    for sampling in (GREEDY, Sampling(temperature=0.8, max_new_tokens=30)):
        plain = generation.generate_batch(tiny_loaded, PROMPTS, sampling)
        fast = generation.generate_batch(tiny_loaded, PROMPTS, sampling, decoding=Decoding("compiled"))
        assert [reply.token_ids for reply in fast] == [reply.token_ids for reply in plain]
    assert tiny_loaded.decoder.sizes == {(3, 128)}  # no longer than the model's context


def test_a_repeating_text_takes_fewer_passes_with_lookup(mini):
    prompt = "The dog ran to the red house. " * 6
    plain = generation.generate(mini, prompt, GREEDY)
    lookup = generation.generate(mini, prompt, GREEDY, decoding=Decoding("lookup"))
    assert plain.passes == plain.tokens == lookup.tokens
    assert lookup.passes < plain.passes
    assert lookup.proposed == 0  # nothing but the text proposes


def test_acceptance_is_counted_as_a_loop_by_hand_counts_it(mini, mini_chat):
    """A model that drafts for itself is always right; another draft is right as often as its greedy tokens agree."""
    itself = generation.generate(mini, PROMPTS[0], GREEDY, decoding=Decoding("speculative", mini))
    assert itself.acceptance_rate == 1
    draft, candidates = shallow(mini_chat, 2), 3
    reply = generation.generate(mini_chat, PROMPTS[0], GREEDY, decoding=Decoding("speculative", draft, candidates))
    passes, proposed = by_hand(mini_chat, draft, PROMPTS[0], list(reply.token_ids), candidates)
    assert (reply.passes, reply.proposed) == (passes, proposed)
    assert reply.acceptance_rate == (reply.tokens - passes) / proposed


def by_hand(loaded: Loaded, draft: Loaded, prompt: str, tokens: list[int], candidates: int) -> tuple[int, int]:
    """Passes of the model and tokens proposed, where ``tokens`` are the model's greedy ones."""
    before = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    done = passes = proposed = 0
    while done < len(tokens):
        guess: list[int] = []
        while len(guess) < min(candidates, len(tokens) - done - 1):
            ids = torch.tensor([before + tokens[:done] + guess])
            with torch.inference_mode():
                guess.append(int(draft.model(ids).logits[0, -1].argmax()))
            if guess[-1] == loaded.tokenizer.eos_token_id:
                break
        taken = next((n for n, token in enumerate(guess) if token != tokens[done + n]), len(guess))
        done, passes, proposed = done + taken + 1, passes + 1, proposed + len(guess)
    return passes, proposed


def test_what_can_propose_for_one_greedy_sequence_alone_falls_back(mini):
    way = Decoding("speculative", mini)
    drawn = Sampling(temperature=0.8, max_new_tokens=10)
    assert generation.generate(mini, PROMPTS[0], drawn, decoding=way).token_ids == (
        generation.generate(mini, PROMPTS[0], drawn).token_ids
    )
    several = generation.generate_batch(mini, PROMPTS, GREEDY, decoding=way)
    assert [reply.proposed for reply in several] == [0, 0, 0]


@pytest.mark.parametrize("path", ["lookup", "speculative"])
def test_a_stop_string_or_the_limit_cuts_what_was_taken_at_once(mini_chat, path):
    way = Decoding(path, mini_chat if path == "speculative" else None)
    for limit in (1, 2, 3, 7):
        sampling = replace(GREEDY, max_new_tokens=limit)
        question = [{"role": "user", "content": "What is a dog?"}]
        fast, plain = (generation.generate(mini_chat, question, sampling, decoding=each) for each in (way, PLAIN))
        assert (fast.text, fast.tokens, fast.finish_reason) == (plain.text, plain.tokens, plain.finish_reason)


def test_a_chat_decodes_as_told(mini_chat):
    fast, plain = (Chat(mini_chat, sampling=GREEDY, decoding=way) for way in (Decoding("lookup"), PLAIN))
    assert fast.ask("Hello. Who are you?").text == plain.ask("Hello. Who are you?").text
    assert "".join(fast.stream("What is a dog?")) == "".join(plain.stream("What is a dog?"))


def test_long_prompts_are_read_in_chunks_that_the_plan_has_room_for(mini, monkeypatch):
    prompt = "The dog ran to the red house. " * 50
    whole = peak_of(mini, prompt)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 64)
    chunked = peak_of(mini, prompt)
    assert chunked[0].token_ids == whole[0].token_ids
    tokens = whole[0].prompt_tokens + whole[0].tokens
    planned = estimate(mini.model.config, "fp32", workload=Workload(context_tokens=tokens))
    assert chunked[1] < 0.6 * whole[1]
    assert chunked[1] < planned.kv_cache + planned.activations


def peak_of(loaded: Loaded, prompt: str):
    replies, sampling = [], replace(GREEDY, max_new_tokens=4)
    peak = _peak_memory(lambda: replies.append(generation.generate(loaded, prompt, sampling)), loaded.model.device)
    return replies[0], peak


@pytest.mark.parametrize(
    ("way", "complaint"),
    [
        (Decoding("speculative"), "needs a draft"),
        (Decoding("lookup", candidates=0), "candidates must be a whole number from 1"),
    ],
)
def test_impossible_ways_are_refused(tiny_loaded, way, complaint):
    for call in (generation.generate, generation.stream):  # a stream before its first piece
        with pytest.raises(WorkbookError, match=complaint):
            call(tiny_loaded, "A dog", GREEDY, decoding=way)


def test_a_draft_with_another_vocabulary_is_refused(mini):
    llama = models.load(load_profile("laptop").llama_chat, "bf16")
    with pytest.raises(WorkbookError, match="their vocabularies differ"):
        generation.generate(mini, "A dog", GREEDY, decoding=Decoding("speculative", llama))


@pytest.mark.parametrize("padded", ["draft", "model"])
def test_rows_that_pad_the_vocabulary_are_refused_until_the_advice_is_taken(mini, padded):
    """E10: 4,112 rows for 4,096 tokens, as some published checkpoints have; the reply is then that without a draft."""
    rows = {"model": 4096, "draft": 4096} | {padded: 4112}
    model, draft = shallow(mini, 4), shallow(mini, 1)
    model.model.resize_token_embeddings(rows["model"])
    draft.model.resize_token_embeddings(rows["draft"])
    way = Decoding("speculative", draft)
    expected = generation.generate(model, PROMPTS[0], GREEDY).text
    with pytest.raises(WorkbookError, match=r"rows, and the model's") as caught:
        generation.generate(model, PROMPTS[0], GREEDY, decoding=way)
    exec(re.search(r"draft\.model\.resize_token_embeddings\(.*?\)", str(caught.value))[0], {"draft": draft})
    assert generation.generate(model, PROMPTS[0], GREEDY, decoding=way).text == expected


def test_what_cannot_be_compiled_says_why_and_a_profile_falls_back(tiny_loaded, monkeypatch):
    profile = replace(load_profile("laptop"), decoding="compiled")
    nf4 = models.load(profile.falcon, "nf4")
    assert "nf4 layers" in generation.cannot_compile(nf4)
    with pytest.raises(WorkbookError, match=r"compiled.: torch\.compile cannot compile the nf4 layers"):
        generation.generate(nf4, "A dog", GREEDY, decoding=Decoding("compiled"))
    assert generation.for_profile(profile, nf4) == PLAIN
    monkeypatch.setattr(torch, "__file__", "/home/a folder/torch/__init__.py")
    assert "contains a space" in generation.cannot_compile(tiny_loaded)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in generation.cannot_compile(tiny_loaded)
    assert generation.for_profile(profile, tiny_loaded) == PLAIN
    assert generation.for_profile(replace(profile, decoding="lookup"), tiny_loaded) == Decoding("lookup")


def test_an_unloaded_model_is_kept_by_nothing(mini):
    """What decoding keeps beside a model must not keep the model."""
    import gc
    import weakref

    loaded = models.load(mini.ref, "bf16")
    generation.generate(loaded, "A dog", replace(GREEDY, max_new_tokens=2))
    weights = weakref.ref(loaded.model.transformer)
    models.unload(loaded)
    gc.collect()
    assert weights() is None


def test_another_model_in_the_same_place_is_the_one_that_replies(mini, mini_chat):
    loaded = replace(mini)
    first = generation.generate(loaded, PROMPTS[0], GREEDY)
    loaded.model = mini_chat.model
    second = generation.generate(loaded, PROMPTS[0], GREEDY)
    assert first.token_ids != second.token_ids
    assert list(second.token_ids) == list(generation.generate(mini_chat, PROMPTS[0], GREEDY).token_ids)
