"""B1: a model that computes NaN or infinity is named by its layer, wherever its numbers are used."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from helpers import evaluation, generation
from helpers.generation import Decoding, Sampling
from helpers.models import NotFiniteError
from helpers.models.finite import NotFiniteFoundError, all_finite, check_sums, explained

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = "transformer.h.1.mlp.dense_h_to_4h"
GREEDY = Sampling(temperature=0, max_new_tokens=4)
QUESTIONS = [evaluation.Question("A small", (" cat", " red house"), 0)]
USES = {
    "generate": lambda loaded: generation.generate(loaded, "A small cat", GREEDY),
    "sampled": lambda loaded: generation.generate(loaded, "A small cat", Sampling(max_new_tokens=4)),
    "batch": lambda loaded: generation.generate_batch(loaded, ["A small cat", "Once upon a time there was"], GREEDY),
    "stream": lambda loaded: list(generation.stream(loaded, "A small cat", GREEDY)),
    "lookup": lambda loaded: generation.generate(loaded, "A cat, a cat", GREEDY, decoding=Decoding("lookup")),
    "next token": lambda loaded: generation.next_token_probabilities(loaded, "A small cat"),
    "perplexity": lambda loaded: evaluation.perplexity(loaded, ["A small cat sat.", "A red house."]),
    "multiple choice": lambda loaded: evaluation.multiple_choice(loaded, QUESTIONS),
    "harness": lambda loaded: evaluation.evaluate(loaded, ["animal_choice"], 2),
}


def broken(loaded, change):
    model = copy.deepcopy(loaded.model)
    change(model)
    return replace(loaded, model=model)


def nan_weight(model):
    model.transformer.h[1].mlp.dense_h_to_4h.weight.data[3, 4] = math.nan


def infinite_weight(model):
    model.transformer.h[1].mlp.dense_h_to_4h.weight.data[3, 4] = math.inf


def nan_logit_of_an_unlikely_token(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data[7, 0] = math.nan


def logits_all_minus_infinity(model):
    model.lm_head.register_forward_hook(lambda _module, _given, made: torch.full_like(made, -math.inf))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_nan_weight_is_named_wherever_the_numbers_are_used(tiny_loaded, use):
    with pytest.raises(NotFiniteError, match=f"first in {LAYER}, whose weight holds 1 of them"):
        use(broken(tiny_loaded, nan_weight))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("change", [nan_logit_of_an_unlikely_token, logits_all_minus_infinity])
def test_logits_that_are_not_finite_are_named(tiny_loaded, use, change):
    with pytest.raises(NotFiniteError, match="first in lm_head"):
        use(broken(tiny_loaded, change))


def test_an_infinite_weight_is_named(tiny_loaded):
    with pytest.raises(NotFiniteError, match=f"first in {LAYER}, whose weight holds 1 of them"):
        USES["generate"](broken(tiny_loaded, infinite_weight))


def test_activations_beyond_float16_are_named_with_what_to_do(tiny_loaded):
    def overflow(model):
        model.half()
        model.transformer.h[0].mlp.dense_h_to_4h.weight.data *= 1000
        model.transformer.h[0].mlp.dense_4h_to_h.weight.data *= 1000

    half = broken(tiny_loaded, overflow)
    half = replace(half, report=replace(half.report, precision="fp16"))
    with pytest.raises(NotFiniteError, match=r"transformer\.h\.0\..*65,504\. Load the model in bf16 or fp32"):
        USES["perplexity"](half)


def test_the_draft_is_named_if_it_is_at_fault(tiny_loaded):
    draft = broken(tiny_loaded, nan_weight)
    draft = replace(draft, ref=replace(draft.ref, id="tests/the-draft"))
    with pytest.raises(NotFiniteError, match=f"the-draft computes .* first in {LAYER}"):
        generation.generate(tiny_loaded, "A small cat", GREEDY, decoding=Decoding("speculative", draft))


def test_a_failure_that_does_not_repeat_is_said(tiny_loaded):
    with pytest.raises(NotFiniteError, match="not when asked again"), explained(tiny_loaded):
        raise NotFiniteFoundError([[1, 2, 3]])


def test_a_look_at_finite_numbers_changes_nothing():
    assert all_finite(torch.full((4,), 3e38))  # their sum is infinite
    assert all_finite(torch.ones(3, dtype=torch.float16) * 60000)
    assert not all_finite(torch.tensor([1.0, -math.inf]))
    check_sums([1.0, -2.0], [[1], [2]])
    with pytest.raises(NotFiniteFoundError) as found:
        check_sums([1.0, math.nan], [[1], [2]])
    assert found.value.rows == [[2]]


def test_hooks_are_gone_after_a_failure(tiny_loaded):
    wrong = broken(tiny_loaded, nan_weight)
    with pytest.raises(NotFiniteError):
        USES["generate"](wrong)
    assert not any(module._forward_hooks for module in wrong.model.modules())
