"""Exercises of notebook 01: the share of the MLP, greedy decoding, top-p, when prompt lookup pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.reading import (
    _is_close,
    _listed,
    _number,
    _other_unit,
    _plain,
    _tensor,
    _text,
    _UnreadableError,
)
from helpers.exercises.verdict import _Exercise, _Found

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import FalconConfig, FalconForCausalLM

    from helpers.exercises.verdict import Outcome
    from helpers.generation.sampling import Reply
    from helpers.models.loaded import Loaded

_NEW_TOKENS = 40  # exercise 4 compares replies of so many tokens
_PAYS, _DOES_NOT = 0.5, 0.85  # passes per token: at most and at least


def _mlp_share(function: Callable[[FalconConfig], object]) -> Outcome:
    from transformers import FalconConfig

    shapes = [(14848, 232, 8), (8192, 128, 8), (256, 8, 2)]
    for hidden, heads, kv_heads in shapes:
        config = FalconConfig(
            hidden_size=hidden, num_attention_heads=heads, num_kv_heads=kv_heads, new_decoder_architecture=True
        )
        head_dim = hidden // heads
        attention = hidden * (heads + 2 * kv_heads) * head_dim + hidden * hidden
        mlp = 8 * hidden * hidden
        given, expected = _number(function(config)), mlp / (mlp + attention)
        if _is_close(given, expected, 1e-3):
            continue
        if off := _other_unit(given, expected, {"in percent": 100}):
            return f"{off} Return a share of 1."
        if _is_close(given, 1 - expected):
            return "That is the share of the attention."
        return (
            f"For hidden size {hidden}, {heads} heads and {kv_heads} key-value heads it returns {given:.5g}, "
            "which is not right."
        )
    return None


def _tiny_falcon(seed: int) -> FalconForCausalLM:
    """A random Falcon of two layers with 180B's flags, in fp32."""
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, bias=False, alibi=False, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FalconForCausalLM(config)
    model.eval()
    return model


def _greedy(function: Callable[[FalconForCausalLM, Tensor, int], object]) -> Outcome:
    import torch

    prompt = [5, 17, 80]
    for seed, count in ((0, 1), (1, 7)):
        model, ids = _tiny_falcon(seed), torch.tensor([prompt])
        given = _row(function(model, ids, count))
        expected = _generated(model, ids, count)[0].tolist()
        if given == expected:
            continue
        if given == expected[len(prompt) :]:
            return "These are the new ids alone. Return those of the prompt too, first."
        if given[: len(prompt)] != prompt:
            return f"The result should begin with the ids of the prompt, {prompt}, but begins with {given[:3]}."
        if len(given) != len(expected):
            return f"With count = {count} it adds {len(given) - len(prompt)} ids to the prompt."
        wrong = next(place for place, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1])
        return f"New token {wrong - len(prompt) + 1} of {count} is not the one that model.generate chooses."
    return None


def _row(answer: object) -> list[object]:
    """The ids of one row, in a batch of one or alone. Raises _UnreadableError for everything else."""
    if isinstance(answer, dict):  # what generate returns with return_dict_in_generate
        raise _UnreadableError(f"Return the ids alone; this is a {type(answer).__name__} with {', '.join(answer)}.")
    rows = _listed(answer)
    if len(rows) == 1 and not isinstance(rows[0], int):
        return _listed(rows[0])
    return [_plain(element) for element in rows]  # such as a list of tensors with one id each


def _generated(model: FalconForCausalLM, ids: Tensor, count: int) -> Tensor:
    import torch

    with torch.inference_mode():
        # transformers types the result as one of five classes; without return_dict_in_generate it is the ids.
        return model.generate(  # type: ignore[misc, return-value]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )


def _top_p(function: Callable[[Tensor, float], object]) -> Outcome:
    import torch
    from transformers import TopPLogitsWarper

    # The last p keeps the likeliest token alone, although its probability exceeds p.
    for seed, p in ((0, 0.9), (1, 0.5), (2, 0.05)):
        logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 2
        # The warper looks at the scores alone, so it gets no ids.
        expected = TopPLogitsWarper(top_p=p)(None, logits.clone()).softmax(-1)[0]
        given = _tensor(function(logits.softmax(-1)[0], p)).squeeze()
        if given.shape != expected.shape:
            return f"For 20 probabilities it returns the shape {tuple(given.shape)}. Set the others to zero."
        if torch.allclose(given, expected, atol=1e-5):
            continue
        kept, right = int((given > 0).sum()), int((expected > 0).sum())
        if kept == right and not torch.isclose(given.sum(), torch.tensor(1.0), atol=1e-4):
            return f"For p = {p} the result sums to {given.sum():.3f}."
        if kept == right:
            return f"For p = {p} the probabilities kept are not those of the likeliest tokens, each in its place."
        return f"For p = {p} it keeps {kept} tokens of 20, which is too {'many' if kept > right else 'few'}."
    return None


def _lookup(answer: object, model: Loaded) -> Outcome:
    pays, does_not = _prompts(answer)
    from helpers.generation.decoding import Decoding
    from helpers.generation.generating import generate
    from helpers.generation.sampling import Sampling

    greedy, lookup = Sampling(temperature=0, max_new_tokens=_NEW_TOKENS), Decoding("lookup")
    replies = [generate(model, prompt, greedy, decoding=lookup) for prompt in (pays, does_not)]
    for prompt, reply in zip((pays, does_not), replies, strict=True):
        if reply.tokens < _NEW_TOKENS:
            return f"After {prompt!r} the model stops after {reply.tokens} tokens. Find a prompt with a longer reply."
    first, second = replies
    measured = (
        f"Passes for {_NEW_TOKENS} tokens: {first.passes} after the first prompt, {second.passes} after the second."
    )
    if _share(first) > _PAYS:
        return f"{measured} The first prompt does not save half of the passes."
    if _share(second) < _DOES_NOT:
        return f"{measured} The second prompt saves too many."
    return _Found(f"{measured} Compare the two replies: what does prompt lookup live on?")


def _share(reply: Reply) -> float:
    return reply.passes / reply.tokens


def _prompts(answer: object) -> tuple[str, str]:
    """Two prompts. Raises _UnreadableError for everything else."""
    prompts = [_text(prompt) for prompt in _listed(answer)]
    if len(prompts) != 2:
        raise _UnreadableError(f"Give two prompts: one that pays and one that does not. Here are {len(prompts)}.")
    return prompts[0], prompts[1]


EXERCISES = {
    "01-1": _Exercise(
        _mlp_share,
        (
            "The notebook prints a decoder layer. Write down the shape of each of its matrices.",
            "query_key_value has rows for every query head, and for the key and the value of every key-value head.",
            "The MLP widens the hidden size by four and narrows it again.",
        ),
    ),
    "01-2": _Exercise(
        _greedy,
        (
            "One call of the model gives logits for every position. Which position says what comes next?",
            "The new id becomes part of the input of the next call. torch.cat joins tensors along a dimension.",
        ),
    ),
    "01-3": _Exercise(
        _top_p,
        (
            "Sort first; torch's sort also returns where each element came from, so that you can go back.",
            "Is the token that takes the sum over p kept or not? Read the sentence of the exercise again.",
            "What is kept if the likeliest token alone has more than p?",
        ),
    ),
    "01-4": _Exercise(
        _lookup,
        (
            "Prompt lookup proposes what followed the last two tokens when they occurred before. When is that right?",
            "A prompt that repeats itself helps only if the model goes on repeating. Read the replies.",
            "generation.generate(loaded, prompt, sampling, decoding=Decoding('lookup')).passes counts the passes.",
        ),
    ),
}
